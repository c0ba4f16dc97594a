"""What the stages of a Swin Transformer are made of.

Attributes:
  SwinBlock: attention in windows, then a feed-forward.
  WindowAttention: attention in windows, with a bias of relative positions.
  PatchMerging: a grid to one of half its sides and twice its width.
  layer_norm: the normalisation of all of them.
  pad_grid: a grid with zeros up to whole windows.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from msba_jax.layers.attention import attend
from msba_jax.layers.relative_position import (
  relative_position_index,
  shifted_window_mask,
)
from msba_jax.models.blocks import (
  Attend,
  FeedForward,
  KeyProjection,
  queries_keys_values,
  split_heads,
)
from msba_jax.models.stochastic_depth import drop_branch

__all__ = [
  'PatchMerging',
  'SwinBlock',
  'WindowAttention',
  'layer_norm',
  'pad_grid',
]


class SwinBlock(nn.Module):
  """x + attention(norm(x)) in windows, then x + feed-forward(norm(x)).

  Attributes:
    num_heads: number of heads.
    window: largest side of a window, in tokens.
    shifted: whether the windows are shifted by half their side.
    ratio: width of the feed-forward over that of the tokens.
    attend: the attention function.
    keys: makes the key projection, as in `WindowAttention`.
    dtype: of the computation.
  """

  num_heads: int
  window: int
  shifted: bool
  ratio: int = 4
  attend: Attend = attend
  keys: KeyProjection | None = None
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(
    self, grid: Array, drop: Float32[Array, ''] | None = None
  ) -> Array:
    """(n, y, x, d) to the same shape; `drop` as in `drop_branch`."""
    _, height, width, features = grid.shape
    side = min(self.window, height, width)
    tokens = pad_grid(layer_norm('norm_attention', self.dtype)(grid), side)
    padded_height, padded_width = tokens.shape[1:3]
    shift, mask = 0, None
    if self.shifted and self.window < min(height, width):
      shift = side // 2
      tokens = jnp.roll(tokens, (-shift, -shift), axis=(1, 2))
      mask = jnp.asarray(
        shifted_window_mask(
          padded_height, padded_width, window=side, shift=shift
        )
      )[:, None]
    message = WindowAttention(
      self.num_heads,
      side,
      self.window,
      self.attend,
      self.keys,
      self.dtype,
      name='attention',
    )(_to_windows(tokens, side), mask=mask)
    message = _to_grid(message, padded_height, padded_width, side)
    if shift:
      message = jnp.roll(message, (shift, shift), axis=(1, 2))
    grid = grid + drop_branch(self, message[:, :height, :width], drop)
    feed_forward = FeedForward(
      self.ratio * features,
      activation=partial(jax.nn.gelu, approximate=False),
      dtype=self.dtype,
      name='feed_forward',
    )
    inner = feed_forward(layer_norm('norm_feed_forward', self.dtype)(grid))
    return grid + drop_branch(self, inner, drop)


class WindowAttention(nn.Module):
  """Self-attention in every window, biased by relative positions.

  Attributes:
    num_heads: number of heads.
    side: side of a window, in tokens.
    window: side of the window that the table of biases is made for, at least
      `side`.
    attend: the attention function.
    keys: called as keys(features, grid=(side, side), prefix=0, name='keys'), it
      makes a module from tokens (*b, t, d) to keys (*b, t, features). None
      projects queries, keys and values together.
    dtype: of the computation.
  """

  num_heads: int
  side: int
  window: int
  attend: Attend = attend
  keys: KeyProjection | None = None
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, 'n w t d'],
    *,
    mask: Bool[Array, 'w 1 t t'] | None = None,
  ) -> Float[Array, 'n w t d']:
    """Tokens of every window, row-major, to the same shape."""
    features = tokens.shape[-1]
    projected = queries_keys_values(
      tokens,
      features,
      self.keys,
      grid=(self.side, self.side),
      dtype=self.dtype,
    )
    table = self.param(
      'bias',
      nn.initializers.truncated_normal(0.02),
      ((2 * self.window - 1) ** 2, self.num_heads),
    )
    index = relative_position_index(self.side, window=self.window)
    message = self.attend(
      *(split_heads(x, self.num_heads) for x in projected),
      mask=mask,
      bias=jnp.moveaxis(table[index], -1, 0),
    )
    return nn.Dense(features, dtype=self.dtype, name='out')(
      message.reshape(tokens.shape)
    )


class PatchMerging(nn.Module):
  """Four neighbours joined and projected to twice the width.

  Attributes:
    dtype: of the computation.
  """

  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, grid: Array) -> Array:
    """(n, y, x, d) to (n, ⌈y / 2⌉, ⌈x / 2⌉, 2 d)."""
    grid = pad_grid(grid, 2)
    n, height, width, d = grid.shape
    pairs = grid.reshape(n, height // 2, 2, width // 2, 2, d)
    # Published weights count the four column by column.
    joined = jnp.transpose(pairs, (0, 1, 3, 4, 2, 5)).reshape(
      n, height // 2, width // 2, 4 * d
    )
    return nn.Dense(2 * d, use_bias=False, dtype=self.dtype, name='reduce')(
      layer_norm('norm', self.dtype)(joined)
    )


def layer_norm(name: str, dtype: jax.typing.DTypeLike | None) -> nn.LayerNorm:
  """With the epsilon of the published weights."""
  return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)


def pad_grid(grid: Array, multiple: int) -> Array:
  """Zeros below and to the right, up to multiples of a size."""
  below, right = (-size % multiple for size in grid.shape[1:3])
  return jnp.pad(grid, ((0, 0), (0, below), (0, right), (0, 0)))


def _to_windows(grid: Array, side: int) -> Array:
  """(n, y, x, d) to (n, w, t, d), row by row."""
  n, height, width, d = grid.shape
  parts = grid.reshape(n, height // side, side, width // side, side, d)
  return jnp.swapaxes(parts, 2, 3).reshape(n, -1, side * side, d)


def _to_grid(windows: Array, height: int, width: int, side: int) -> Array:
  """The inverse of `_to_windows`."""
  n, _, _, d = windows.shape
  parts = windows.reshape(n, height // side, width // side, side, side, d)
  return jnp.swapaxes(parts, 2, 3).reshape(n, height, width, d)
