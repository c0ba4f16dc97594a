"""Where the tokens of a window stand to each other, from static sizes.

Attributes:
  relative_position_index: the row of a table for every displacement.
  shifted_window_mask: tokens that a cyclic shift has not brought together.
"""

import numpy as np
from jaxtyping import Bool, Int

__all__ = ['relative_position_index', 'shifted_window_mask']


def relative_position_index(
  side: int, *, window: int | None = None
) -> Int[np.ndarray, 't t']:
  """Row of the displacement of every pair of tokens of a square window.

  For token t at (y, x) and token s at (v, u), with w the window of the table,

      index[t, s] = (y − v + w − 1)(2 w − 1) + (x − u + w − 1)

  so that a smaller window reads the rows of its displacements from the table of
  a larger one.

  Args:
    side: side of the window, in tokens.
    window: side of the window that the table is made for; None is `side`.

  Returns:
    Rows of a table of (2 window − 1)², tokens row-major; queries first.

  Raises:
    ValueError: the side is not positive or larger than the window.

  Example:
    >>> relative_position_index(2)[0].tolist()
    [4, 3, 1, 0]

  Source: Swin Transformer (2021), arXiv 2103.14030.
  """
  window = side if window is None else window
  if not 0 < side <= window:
    raise ValueError(f'{side=} must lie in 1 … {window=}')
  places = np.indices((side, side), np.int32).reshape(2, -1)
  row, column = places[:, :, None] - places[:, None] + window - 1
  return row * (2 * window - 1) + column


def shifted_window_mask(
  height: int, width: int, *, window: int, shift: int
) -> Bool[np.ndarray, 'w t t']:
  """Which tokens of a window stood side by side before a cyclic shift.

  A grid is rolled by `shift` towards its upper left corner and cut into
  windows. Those at the lower and right edge then hold tokens from opposite
  edges of the grid, which must not see each other.

  Args:
    height: rows of the grid, a multiple of the window.
    width: columns of the grid, a multiple of the window.
    window: side of a window, in tokens.
    shift: how far the grid was rolled along both axes, in tokens.

  Returns:
    True where both tokens are from the same side of every edge; windows and
    their tokens row by row.

  Raises:
    ValueError: the window does not divide the grid, or the shift is not smaller
      than the window.

  Example:
    >>> mask = shifted_window_mask(2, 4, window=2, shift=1)
    >>> mask[0, 0].tolist(), mask[1, 0].tolist()
    ([True, True, False, False], [True, False, False, False])

  Source: Swin Transformer (2021), arXiv 2103.14030.
  """
  if min(height, width, window) < 1 or height % window or width % window:
    raise ValueError(f'{window=} must divide {height=} and {width=}')
  if not 0 <= shift < window:
    raise ValueError(f'{shift=} must lie in 0 … {window - 1}')
  row, column = (np.arange(size) >= size - shift for size in (height, width))
  part = 2 * row[:, None] + column
  parts = part.reshape(height // window, window, width // window, window)
  parts = np.swapaxes(parts, 1, 2).reshape(-1, window * window)
  return parts[:, :, None] == parts[:, None]
