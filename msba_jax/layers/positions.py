r"""Tables of positions for grids of another size than they were trained on.

Attributes:
  cubic_weights: the matrix that resamples one axis.
  resize_positions: a table of positions for another grid.

Source: Cubic Convolution Interpolation for Digital Image Processing (1981),
doi 10.1109/TASSP.1981.1163711.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ['cubic_weights', 'resize_positions']


def cubic_weights(size: int, goal: int, *, antialias: bool = False):
  """How every new place of an axis is made of the old ones.

  The convention of PyTorch's `interpolate` with half-pixel centres: without
  antialiasing the kernel has a = −0.75 and the border is repeated; with it
  a = −0.5, the kernel is widened where the axis shrinks, and the weights of
  what lies inside are scaled to sum to one.

  Args:
    size: old places.
    goal: new places.
    antialias: whether details that the new axis cannot hold are averaged.

  Returns:
    NumPy float32 (goal, size); rows sum to one.

  Example:
    >>> cubic_weights(2, 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  scale = size / goal
  center = (np.arange(goal)[:, None] + 0.5) * scale - 0.5
  width = max(scale, 1.0) if antialias else 1.0
  a = -0.5 if antialias else -0.75
  # Far enough outside for the widest kernel.
  margin = int(np.ceil(2 * width)) + 1
  place = np.arange(-margin, size + margin)[None]
  weights = _cubic((place - center) / width, a)
  if antialias:
    weights = weights[:, margin : margin + size]
    weights = weights / weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)
  matrix = np.zeros((goal, size))
  for column, old in enumerate(np.clip(place[0], 0, size - 1)):
    matrix[:, old] += weights[:, column]
  return matrix.astype(np.float32)


def resize_positions(
  table: Float[Array, 'y x d'],
  grid: tuple[int, int],
  *,
  antialias: bool = False,
) -> Float[Array, '{grid[0]} {grid[1]} d']:
  """A table of positions, resampled bicubically for another grid.

  Args:
    table: one vector a place.
    grid: rows and columns wanted.
    antialias: see `cubic_weights`.

  Returns:
    The table for the grid, in the same dtype; the same array if it fits.

  Raises:
    ValueError: the grid has no place.

  Example:
    >>> table = jnp.arange(4.0).reshape(2, 2, 1)
    >>> resize_positions(table, (1, 1))[0, 0].tolist()
    [1.5]
  """
  if min(grid) < 1:
    raise ValueError(f'{grid=} must have at least one row and one column')
  if table.shape[:2] == tuple(grid):
    return table
  rows, columns = (
    cubic_weights(size, goal, antialias=antialias)
    for size, goal in zip(table.shape[:2], grid, strict=True)
  )
  resized = jnp.einsum(
    'Yy,Xx,yxd->YXd',
    rows,
    columns,
    table.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return resized.astype(table.dtype)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """The kernel of cubic convolution with the parameter a."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x**2 + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))
