"""Windows that slide over a grid of tokens.

A window is a set of tokens, a grid of windows an index map computed once from
static sizes. A window that reaches over the edge is filled up and marked.

Attributes:
  Windows: token indices of every window and which of them are real.
  sliding_windows: windows of one size and stride.
  partition_windows: a grid cut into p × p parts, for any grid size.
  window_partition: tokens to windows.
  window_merge: windows back to tokens, overlaps averaged.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = [
  'Windows',
  'partition_windows',
  'sliding_windows',
  'window_merge',
  'window_partition',
]


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


def window_partition(
  tokens: Float[Array, 'n t d'], windows: Windows
) -> Float[Array, 'n w s d']:
  """Gathers the tokens of every window; places without a token are zero.

  Args:
    tokens: tokens of a grid, row-major.
    windows: w windows of s tokens each.

  Returns:
    The tokens of every window.

  Raises:
    ValueError: the windows belong to a grid of another size.
  """
  _check(tokens.shape[1], windows)
  gathered = jnp.take(tokens, windows.indices, axis=1)
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
  counts = np.zeros(windows.tokens, np.float32)
  np.add.at(counts, windows.indices[windows.valid], 1)
  places = np.where(windows.valid, windows.indices, windows.tokens)
  n, _, _, d = values.shape
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


def _check(tokens: int, windows: Windows) -> None:
  if tokens != windows.tokens:
    raise ValueError(
      f'the windows belong to {windows.tokens} tokens, not to {tokens}'
    )
