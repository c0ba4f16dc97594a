"""Blocks that several models share: attention over tokens, feed-forward.

Attributes:
  Images: images, or the grids of a backbone that was applied before.
  KeyProjection: makes the module that projects tokens to keys.
  FeedForward: two dense layers with an activation between.
  TokenAttention: multi-head self-attention over tokens of one image.
  TransformerBlock: pre-norm attention and feed-forward with residuals.
  queries_keys_values: the three projections of an attention module.
  run_blocks: a stack of transformer blocks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from msba_jax.layers.attention import attend
from msba_jax.models.stochastic_depth import drop_branch

__all__ = [
  'FeedForward',
  'KeyProjection',
  'TokenAttention',
  'TransformerBlock',
  'positive_parameter',
  'queries_keys_values',
  'run_blocks',
  'small_init',
  'split_heads',
]

Attend = Callable[..., Array]
Activation = Callable[[Array], Array]
# Called as keys(features, grid=…, prefix=…, name=…): the tokens behind the
# first `prefix` are those of a grid of this size, or there is no grid.
KeyProjection = Callable[..., nn.Module]
Images = Float[Array, 'n height width c'] | Sequence[Float[Array, 'n _ _ _']]


def split_heads(inputs: Array, num_heads: int) -> Array:
  """(…, d) to (…, h, d / h).

  Raises:
    ValueError: the heads do not divide the features.
  """
  features = inputs.shape[-1]
  if features % num_heads:
    raise ValueError(f'{num_heads=} must divide {features=}')
  return inputs.reshape(*inputs.shape[:-1], num_heads, features // num_heads)


def positive_parameter(module: nn.Module, name: str, initial: float) -> Array:
  """A parameter of a module that stays positive: the softplus of a scalar."""
  inverse = initial + math.log(-math.expm1(-initial))
  return jax.nn.softplus(
    module.param(name, nn.initializers.constant(inverse), ())
  )


# A tenth of the usual size: a branch that begins as hardly a change.
small_init = nn.initializers.variance_scaling(
  0.01, 'fan_in', 'truncated_normal'
)


class FeedForward(nn.Module):
  """Dense, activation, dense.

  Attributes:
    hidden: width between.
    features: width of the result; None is that of the inputs.
    outer_init: of the second layer's kernel.
    activation: between the layers.
    gated: whether the first layer is twice as wide, and one half of it, behind
      the activation, is multiplied by the other.
    dtype: of the computation; None is that of the inputs.

  Source: GLU Variants Improve Transformer (2020), arXiv 2002.05202, for gates.
  """

  hidden: int
  features: int | None = None
  outer_init: nn.initializers.Initializer = nn.linear.default_kernel_init
  activation: Activation = jax.nn.gelu
  gated: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, inputs: Array) -> Array:
    """(…, d) to (…, features)."""
    width = 2 * self.hidden if self.gated else self.hidden
    hidden = nn.Dense(width, dtype=self.dtype, name='inner')(inputs)
    if self.gated:
      gate, passing = jnp.split(hidden, 2, axis=-1)
      hidden = self.activation(gate) * passing
    else:
      hidden = self.activation(hidden)
    outer = nn.Dense(
      self.features or inputs.shape[-1],
      kernel_init=self.outer_init,
      dtype=self.dtype,
      name='outer',
    )
    return outer(hidden)


def queries_keys_values(
  tokens: Array,
  features: int,
  keys: KeyProjection | None = None,
  *,
  grid: tuple[int, int] | None = None,
  prefix: int = 0,
  dtype: Any = None,
) -> list[Array]:
  """The three projections of a module, made inside its compact method.

  Args:
    tokens: (…, t, _).
    features: width of each projection.
    keys: makes the module of the keys; None is a plain one.
    grid: rows and columns of the grid that the tokens form, if they do.
    prefix: tokens before those of the grid.
    dtype: of the computation.

  Returns:
    Queries, keys and values, (…, t, features) each.
  """
  if keys is None:
    projected = nn.Dense(3 * features, dtype=dtype, name='qkv')(tokens)
    return jnp.split(projected, 3, axis=-1)
  projected = nn.Dense(2 * features, dtype=dtype, name='queries_values')(tokens)
  asking, read = jnp.split(projected, 2, axis=-1)
  answering = keys(features, grid=grid, prefix=prefix, name='keys')(tokens)
  return [asking, answering.astype(asking.dtype), read]


class TokenAttention(nn.Module):
  """Multi-head self-attention over the last axis but one.

  Attributes:
    num_heads: number of heads.
    attend: the attention function.
    keys: makes the module of the keys; None is a plain projection.
    grid: rows and columns of the grid that the tokens form, if they do.
    prefix: tokens before those of the grid.
    dtype: of the computation; None is that of the inputs.
  """

  num_heads: int
  attend: Attend = attend
  keys: KeyProjection | None = None
  grid: tuple[int, int] | None = None
  prefix: int = 0
  dtype: Any = None

  @nn.compact
  def __call__(self, tokens: Array, *, mask: Array | None = None) -> Array:
    """(*b, t, d) to the same shape; mask broadcasts to (*b, h, t, t)."""
    features = tokens.shape[-1]
    projected = queries_keys_values(
      tokens,
      features,
      self.keys,
      grid=self.grid,
      prefix=self.prefix,
      dtype=self.dtype,
    )
    heads = [split_heads(x, self.num_heads) for x in projected]
    message = self.attend(*heads, mask=mask)
    message = message.reshape(tokens.shape)
    return nn.Dense(features, dtype=self.dtype, name='out')(message)


class TransformerBlock(nn.Module):
  """x + s · attention(norm(x)), then x + s · feed-forward(norm(x)).

  Attributes:
    num_heads: number of heads.
    ratio: width of the feed-forward over that of the tokens.
    attend: the attention function.
    hidden: width of the feed-forward, where it is no multiple.
    activation: of the feed-forward.
    gated: of the feed-forward.
    epsilon: of the norms.
    layer_scale: initial factor s of the branches, learned for each feature;
      None is 1, not learned.
    keys: as in `TokenAttention`.
    grid: as in `TokenAttention`.
    prefix: as in `TokenAttention`.
    dtype: of the computation; None is that of the inputs.

  Source: Going deeper with Image Transformers (2021), arXiv 2103.17239, for the
  scale of the branches.
  """

  num_heads: int
  ratio: int = 4
  attend: Attend = attend
  hidden: int | None = None
  activation: Activation = jax.nn.gelu
  gated: bool = False
  epsilon: float = 1e-6
  layer_scale: float | None = None
  keys: KeyProjection | None = None
  grid: tuple[int, int] | None = None
  prefix: int = 0
  dtype: Any = None

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    *,
    mask: Array | None = None,
    drop: Float32[Array, ''] | None = None,
  ) -> Array:
    """(*b, t, d) to the same shape.

    Args:
      tokens: of each image.
      mask: broadcasts to (*b, h, t, t).
      drop: as in `drop_branch`.
    """
    width = tokens.shape[-1]
    attention = TokenAttention(
      self.num_heads,
      self.attend,
      self.keys,
      self.grid,
      self.prefix,
      self.dtype,
      name='attention',
    )
    message = attention(self._norm('norm_attention')(tokens), mask=mask)
    message = self._scaled(message, 'scale_attention')
    tokens = tokens + drop_branch(self, message, drop)
    feed_forward = FeedForward(
      self.hidden or self.ratio * width,
      activation=self.activation,
      gated=self.gated,
      dtype=self.dtype,
      name='feed_forward',
    )
    inner = feed_forward(self._norm('norm_feed_forward')(tokens))
    inner = self._scaled(inner, 'scale_feed_forward')
    return tokens + drop_branch(self, inner, drop)

  def _norm(self, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)

  def _scaled(self, branch: Array, name: str) -> Array:
    if self.layer_scale is None:
      return branch
    factor = self.param(
      name, nn.initializers.constant(self.layer_scale), branch.shape[-1:]
    )
    factor = factor.reshape((1,) * (branch.ndim - 1) + factor.shape)
    return branch * factor.astype(branch.dtype)


def run_blocks(
  make: Callable[..., TransformerBlock],
  depth: int,
  tokens: Array,
  *,
  mask: Array | None = None,
  drop: Float32[Array, ' depth'] | Sequence[None] | None = None,
  remat: bool = False,
  scan: bool = False,
) -> list[Array]:
  """A stack of blocks, made inside the compact method of a module.

  Args:
    make: a block class, or one with fields bound; called with `name`.
    depth: number of blocks.
    tokens: (n, t, d).
    mask: of all blocks.
    drop: the `drop_rates`; by default no branch is left out.
    remat: keep only the tokens between blocks for the gradient, and compute
      what is inside of a block again.
    scan: one block in a loop, which compiles in a `depth`-th of the time. Its
      parameters are those of all blocks, stacked, under `blocks`; without it
      they are under `block_0`, `block_1`, ….

  Returns:
    The tokens after every block.
  """
  rates = [None] * depth if drop is None else drop

  def call(block, inputs, rate):
    outputs = block(inputs, mask=mask, drop=rate)
    return outputs, outputs

  if remat:
    call = nn.remat(call, prevent_cse=not scan)
  if not scan:
    states = []
    for i in range(depth):
      tokens, _ = call(make(name=f'block_{i}'), tokens, rates[i])
      states.append(tokens)
    return states
  loop = nn.scan(
    call,
    variable_axes={'params': 0, 'intermediates': 0, 'penalties': 0},
    split_rngs={'params': True, 'dropout': True},
    length=depth,
  )
  stacked = rates if isinstance(rates, jax.Array) else None
  _, states = loop(make(name='blocks'), tokens, stacked)
  return list(states)
