"""Windows and stripes of a grid of tokens.

A window is a set of tokens, a grid of windows an index map computed once from
static sizes. A window that reaches over the edge is filled up and marked.

Attributes:
  Windows: token indices of every window and which of them are real.
  Direction: the names of the directions of stripes.
  sliding_windows: windows of one size and stride.
  partition_windows: a grid cut into p × p parts, for any grid size.
  stripe_windows: neighbouring rows, columns or diagonals of a grid.
  inverse_order: where in the windows every token stands.
  window_partition: tokens to windows.
  window_merge: windows back to tokens, overlaps averaged.
"""

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = [
  'Direction',
  'Windows',
  'inverse_order',
  'partition_windows',
  'sliding_windows',
  'stripe_windows',
  'window_merge',
  'window_partition',
]


Direction = Literal['horizontal', 'vertical', 'diagonal', 'antidiagonal']


class Windows(NamedTuple):
  """An index map, static: NumPy arrays of shape (windows, tokens a window).

  Attributes:
    indices: flat token index, row-major; 0 where there is no token.
    valid: True where there is one.
    tokens: number of tokens of the grid.
  """

  indices: np.ndarray
  valid: np.ndarray
  tokens: int


def sliding_windows(
  height: int, width: int, *, window: int, stride: int
) -> Windows:
  """Square windows that slide over a height × width grid.

  The first window stands at the upper left corner; further ones follow at the
  stride until every token is covered. A window that reaches over the edge keeps
  the tokens that are there.

  Args:
    height: rows of the grid.
    width: columns of the grid.
    window: side of a window, in tokens.
    stride: step between windows, in tokens; at most the window, or tokens
      would be left out.

  Returns:
    The windows, row by row.

  Raises:
    ValueError: a size is not positive, or the stride is larger than the window.

  Example:
    >>> sliding_windows(2, 4, window=2, stride=2).indices.tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
  """
  if min(height, width, window, stride) < 1:
    raise ValueError(
      f'sizes must be positive: {height=} {width=} {window=} {stride=}'
    )
  if stride > window:
    raise ValueError(f'{stride=} must be at most {window=}')
  return _windows(
    height,
    width,
    [(start, start + window) for start in _starts(height, window, stride)],
    [(start, start + window) for start in _starts(width, window, stride)],
  )


def partition_windows(height: int, width: int, *, parts: int) -> Windows:
  """The grid cut into parts × parts windows, as even as its size allows.

  Part i of a side of s tokens reaches from ⌊i s / parts⌋ to
  ⌈(i + 1) s / parts⌉, as in adaptive pooling: parts overlap by a token where s
  is not divisible, and their number never depends on the grid.

  Args:
    height: rows of the grid.
    width: columns of the grid.
    parts: cuts along each side; 1 is the whole map.

  Returns:
    parts² windows, row by row.

  Raises:
    ValueError: a size is not positive.

  Example:
    >>> partition_windows(3, 1, parts=2).indices.tolist()
    [[0, 1], [0, 1], [1, 2], [1, 2]]
  """
  if min(height, width, parts) < 1:
    raise ValueError(f'sizes must be positive: {height=} {width=} {parts=}')

  def spans(size: int) -> list[tuple[int, int]]:
    return [
      (i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)
    ]

  return _windows(height, width, spans(height), spans(width))


def stripe_windows(
  height: int, width: int, *, direction: Direction, stripe: int
) -> Windows:
  r"""Stripes: every token is in exactly one, with whole lines of the grid.

  With G = max(height, width) a token belongs to the stripe
  ⌊row / stripe⌋ (horizontal), ⌊column / stripe⌋ (vertical),
  ⌊((row − column) mod G) / stripe⌋ (diagonal) or
  ⌊((row + column) mod G) / stripe⌋ (antidiagonal): diagonals wrap round, so
  that all of them hold min(height, width) tokens. Tokens of a stripe stand line
  by line; where the stripe does not divide the number of lines, the last one is
  filled up.

  Args:
    height: rows of the grid.
    width: columns of the grid.
    direction: of the lines.
    stripe: lines of a stripe; more than there are is all of them.

  Returns:
    The stripes, in the order of their lines.

  Raises:
    ValueError: a size is not positive, or the direction is none.

  Example:
    >>> stripes = stripe_windows(3, 3, direction='diagonal', stripe=1)
    >>> stripes.indices.tolist()
    [[0, 4, 8], [2, 3, 7], [1, 5, 6]]

  Source: CSWin Transformer (2021), arXiv 2107.00652; diagonals are ours.
  """
  if min(height, width, stripe) < 1:
    raise ValueError(f'sizes must be positive: {height=} {width=} {stripe=}')
  lines = _lines(height, width, direction)
  count, length = lines.shape
  stripe = min(stripe, count)
  stripes = -(-count // stripe)
  filled = np.zeros((stripes * stripe, length), np.int32)
  filled[:count] = lines
  valid = np.broadcast_to(np.arange(len(filled))[:, None] < count, filled.shape)
  shape = stripes, stripe * length
  return Windows(filled.reshape(shape), valid.reshape(shape), height * width)


def inverse_order(windows: Windows) -> Int[np.ndarray, ' t'] | None:
  """The place of every token among those of all windows, one after the other.

  Args:
    windows: w windows of s tokens each.

  Returns:
    Places from 0 to w s − 1, so that taking them puts tokens back on the grid.
    None where a token is in several windows, or in none.

  Example:
    >>> stripes = stripe_windows(2, 3, direction='vertical', stripe=1)
    >>> stripes.indices.tolist(), inverse_order(stripes).tolist()
    ([[0, 3], [1, 4], [2, 5]], [0, 2, 4, 1, 3, 5])
  """
  found = windows.indices[windows.valid]
  if np.any(np.bincount(found, minlength=windows.tokens) != 1):
    return None
  inverse = np.empty(windows.tokens, np.int32)
  inverse[found] = np.flatnonzero(windows.valid)
  return inverse


def window_partition(
  tokens: Float[Array, 'n t d'], windows: Windows
) -> Float[Array, 'n w s d']:
  """The tokens of every window; places without a token are zero.

  Rows, columns and rectangles are read by a transposition, others by a gather.

  Args:
    tokens: tokens of a grid, row-major.
    windows: w windows of s tokens each.

  Returns:
    The tokens of every window.

  Raises:
    ValueError: the windows belong to a grid of another size.
  """
  if tokens.shape[1] != windows.tokens:
    raise ValueError(
      f'the windows belong to {windows.tokens} tokens, not to {tokens.shape[1]}'
    )
  nested = _nested_axes(windows)
  if nested is not None:
    parts = _transposed(tokens, *nested)
    return parts.reshape(len(tokens), *windows.indices.shape, -1)
  gathered = tokens.at[:, windows.indices].get(mode='promise_in_bounds')
  if windows.valid.all():
    return gathered
  return jnp.where(windows.valid[None, :, :, None], gathered, 0)


def window_merge(
  values: Float[Array, 'n w s d'], windows: Windows
) -> Float[Array, 'n t d']:
  """Puts windows back on the grid; a token in several gets their mean.

  The inverse of `window_partition`, exactly so where windows do not overlap. A
  token that is in no window gets zero.

  Args:
    values: what stands at the places of every window.
    windows: w windows of s tokens each.

  Returns:
    One vector a token, row-major.

  Raises:
    ValueError: the number or size of the windows is another.
  """
  if values.shape[1:3] != windows.indices.shape:
    raise ValueError(
      f'{values.shape=} does not hold windows of {windows.indices.shape=}'
    )
  n, _, _, d = values.shape
  nested = _nested_axes(windows)
  if nested is not None:
    shape, axes = nested
    back = tuple(int(i) for i in np.argsort(axes))
    merged = _transposed(values, tuple(shape[i] for i in axes), back)
    return merged.reshape(n, windows.tokens, d)
  inverse = inverse_order(windows)
  if inverse is not None:
    values = values.reshape(n, -1, d)
    return values.at[:, inverse].get(
      mode='promise_in_bounds', unique_indices=True
    )
  counts = np.zeros(windows.tokens, np.float32)
  np.add.at(counts, windows.indices[windows.valid], 1)
  places = np.where(windows.valid, windows.indices, windows.tokens)
  total = jnp.zeros((n, windows.tokens, d), jnp.float32)
  total = total.at[:, places.reshape(-1)].add(
    values.reshape(n, -1, d).astype(jnp.float32), mode='drop'
  )
  scale = jnp.asarray(1 / np.maximum(counts, 1))
  return (total * scale[None, :, None]).astype(values.dtype)


def _starts(size: int, window: int, stride: int) -> range:
  return range(0, max(size - window, 0) + stride, stride)


def _windows(
  height: int,
  width: int,
  rows: list[tuple[int, int]],
  columns: list[tuple[int, int]],
) -> Windows:
  """All rows × columns, filled up to the largest and cut at the edge."""
  side = [max(b - a for a, b in spans) for spans in (rows, columns)]
  row = np.array([a for a, _ in rows])[:, None] + np.arange(side[0])
  column = np.array([a for a, _ in columns])[:, None] + np.arange(side[1])
  row_valid = row < np.minimum([b for _, b in rows], height)[:, None]
  column_valid = column < np.minimum([b for _, b in columns], width)[:, None]
  valid = row_valid[:, None, :, None] & column_valid[None, :, None, :]
  indices = row[:, None, :, None] * width + column[None, :, None, :]
  shape = (len(rows) * len(columns), side[0] * side[1])
  valid = valid.reshape(shape)
  indices = np.where(valid, indices.reshape(shape), 0).astype(np.int32)
  kept = valid.any(1)
  return Windows(indices[kept], valid[kept], height * width)


def _lines(
  height: int, width: int, direction: Direction
) -> Int[np.ndarray, 'lines length']:
  """Flat token indices of all lines of one direction."""
  grid = np.arange(height * width).reshape(height, width)
  if direction == 'horizontal':
    return grid
  if direction == 'vertical':
    return grid.T
  if direction not in get_args(Direction):
    raise ValueError(f'{direction=} must be one of {get_args(Direction)}')
  line = np.arange(max(height, width))[:, None]
  place = np.arange(min(height, width))[None]
  # row − column = line, or row + column = line; along the shorter side.
  other = line - place
  if direction == 'diagonal':
    other = place - line if height <= width else place + line
  other = other % len(line)
  row, column = (place, other) if height <= width else (other, place)
  return row * width + column


def _nested_axes(
  windows: Windows,
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """The shape and the axes whose transposition reads the windows, if any.

  Their order is that of nested loops with constant steps: the innermost one is
  read off the first tokens, the next off the first tokens of its rounds.
  """
  order = windows.indices.ravel()
  if order.size != windows.tokens or not windows.valid.all():
    return None
  loops, rest = [], order
  while rest.size > 1:
    step = int(rest[1] - rest[0])
    regular = rest == step * np.arange(rest.size)
    size = rest.size if regular.all() else int(np.argmin(regular))
    if size < 2 or step < 1 or rest.size % size:
      return None
    loops.insert(0, (step, size))
    rest = rest[::size]
  outer_first = sorted(loops, reverse=True)
  shape = tuple(size for _, size in outer_first)
  axes = tuple(outer_first.index(loop) for loop in loops)
  made = np.arange(order.size).reshape(shape).transpose(axes).ravel()
  return (shape, axes) if np.array_equal(made, order) else None


def _transposed(
  array: Array, shape: tuple[int, ...], axes: tuple[int, ...]
) -> Array:
  """All axes but the first and the last of an array, as `shape`, in order."""
  array = array.reshape(array.shape[0], *shape, array.shape[-1])
  return array.transpose(0, *(1 + i for i in axes), array.ndim - 1)
