"""Blocks that several models share: attention over tokens, feed-forward.

Attributes:
  Images: images, or the grids of a backbone that was applied before.
  FeedForward: two dense layers with a GELU between.
  TokenAttention: multi-head self-attention over tokens of one image.
  TransformerBlock: pre-norm attention and feed-forward with residuals.
"""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.layers.attention import attend

__all__ = [
  'FeedForward',
  'TokenAttention',
  'TransformerBlock',
  'positive_parameter',
  'small_init',
  'split_heads',
]

Attend = Callable[..., Array]
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
  """Dense, GELU, dense.

  Attributes:
    hidden: width between.
    features: width of the result; None is that of the inputs.
    outer_init: of the second layer's kernel.
  """

  hidden: int
  features: int | None = None
  outer_init: nn.initializers.Initializer = nn.linear.default_kernel_init

  @nn.compact
  def __call__(self, inputs: Array) -> Array:
    """(…, d) to (…, features)."""
    hidden = jax.nn.gelu(nn.Dense(self.hidden, name='inner')(inputs))
    outer = nn.Dense(
      self.features or inputs.shape[-1],
      kernel_init=self.outer_init,
      name='outer',
    )
    return outer(hidden)


class TokenAttention(nn.Module):
  """Multi-head self-attention over the last axis but one.

  Attributes:
    num_heads: number of heads.
    attend: the attention function.
  """

  num_heads: int
  attend: Attend = attend

  @nn.compact
  def __call__(self, tokens: Array, *, mask: Array | None = None) -> Array:
    """(*b, t, d) to the same shape; mask broadcasts to (*b, h, t, t)."""
    features = tokens.shape[-1]
    projected = nn.Dense(3 * features, name='qkv')(tokens)
    queries, keys, values = (
      split_heads(x, self.num_heads) for x in jnp.split(projected, 3, axis=-1)
    )
    message = self.attend(queries, keys, values, mask=mask)
    message = message.reshape(tokens.shape)
    return nn.Dense(features, name='out')(message)


class TransformerBlock(nn.Module):
  """x + attention(norm(x)), then x + feed-forward(norm(x)).

  Attributes:
    num_heads: number of heads.
    ratio: width of the feed-forward over that of the tokens.
    attend: the attention function.
  """

  num_heads: int
  ratio: int = 4
  attend: Attend = attend

  @nn.compact
  def __call__(self, tokens: Array, *, mask: Array | None = None) -> Array:
    """(*b, t, d) to the same shape; mask broadcasts to (*b, h, t, t)."""
    tokens = tokens + TokenAttention(
      self.num_heads, self.attend, name='attention'
    )(nn.LayerNorm(name='norm_attention')(tokens), mask=mask)
    return tokens + FeedForward(
      self.ratio * tokens.shape[-1], name='feed_forward'
    )(nn.LayerNorm(name='norm_feed_forward')(tokens))
