"""Depthwise convolution of a grid.

Attributes:
  depthwise_convolution: every channel with a small kernel of its own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ['depthwise_convolution']


def depthwise_convolution(
  grid: Float[Array, 'n y x d'], kernel: Float[Array, 'a b 1 d']
) -> Float[Array, 'n y x d']:
  r"""Every channel with its own kernel; zeros around the grid.

  o[y, x] = Σ_ab k[a, b] ⊙ g[y + a − A, x + b − B] with A and B half the sides
  of the kernel: a cross-correlation, as in `jax.lax.conv_general_dilated`. On
  CPU, where that takes as long as dense attention over a grid of 32 × 32, the
  shifted grids are added up.

  Args:
    grid: images or tokens.
    kernel: with odd sides, as `flax.linen.Conv` keeps it.

  Returns:
    The convolved grid, in its dtype.

  Raises:
    ValueError: a side of the kernel is even.

  Example:
    >>> grid = jnp.ones((1, 3, 3, 1))
    >>> depthwise_convolution(grid, jnp.ones((3, 3, 1, 1)))[0, :, :, 0].tolist()
    [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
  """
  rows, columns = kernel.shape[:2]
  if not (rows % 2 and columns % 2):
    raise ValueError(f'the sides of the kernel must be odd: {kernel.shape=}')
  if jax.default_backend() != 'cpu':
    return jax.lax.conv_general_dilated(
      grid,
      kernel.astype(grid.dtype),
      window_strides=(1, 1),
      padding='SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=grid.shape[-1],
    )
  height, width = grid.shape[1:3]
  around = ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0))
  padded = jnp.pad(grid, around)
  total = jnp.zeros(grid.shape, jnp.float32)
  for a in range(rows):
    for b in range(columns):
      shifted = padded[:, a : a + height, b : b + width]
      total += shifted * kernel[a, b].reshape(1, 1, 1, -1)
  return total.astype(grid.dtype)
