"""Tests of `msba_jax.layers.relative_position`."""

import numpy as np
import pytest

from msba_jax.layers import relative_position


@pytest.mark.parametrize(
  ('side', 'window'), [(1, 1), (2, 2), (3, 3), (1, 4), (2, 5)]
)
def test_rows_equal_the_definition(side, window):
  index = relative_position.relative_position_index(side, window=window)
  for t, s in np.ndindex(side**2, side**2):
    down, right = t // side - s // side, t % side - s % side
    row, column = divmod(int(index[t, s]), 2 * window - 1)
    assert (row, column) == (down + window - 1, right + window - 1)


def test_the_table_is_that_of_the_window_by_default():
  index = relative_position.relative_position_index(3)
  assert sorted({*index.reshape(-1).tolist()}) == list(range(25))


@pytest.mark.parametrize(
  ('height', 'width', 'window', 'shift'),
  [(4, 4, 2, 1), (6, 9, 3, 1), (14, 7, 7, 0), (8, 12, 4, 2), (2, 1, 1, 0)],
)
def test_the_mask_parts_what_the_shift_brought_together(
  height, width, window, shift
):
  mask = relative_position.shifted_window_mask(
    height, width, window=window, shift=shift
  )
  rows, columns = height // window, width // window
  assert mask.shape == (rows * columns, window**2, window**2)
  places = np.moveaxis(np.indices((height, width)), 0, -1)
  places = np.roll(places, (-shift, -shift), (0, 1))
  for k, (row, column) in enumerate(np.ndindex(rows, columns)):
    inside = places[row * window :, column * window :][:window, :window]
    inside = inside.reshape(-1, 2)
    # Tokens from opposite edges are further apart than a window is wide.
    apart = np.abs(inside[:, None] - inside[None]).max(-1)
    np.testing.assert_array_equal(mask[k], apart < window)


def test_errors_name_the_sizes():
  with pytest.raises(ValueError, match='side=3 must lie'):
    relative_position.relative_position_index(3, window=2)
  with pytest.raises(ValueError, match='side=0 must lie'):
    relative_position.relative_position_index(0, window=2)
  with pytest.raises(ValueError, match='window=2 must divide height=3'):
    relative_position.shifted_window_mask(3, 4, window=2, shift=1)
  with pytest.raises(ValueError, match='shift=2 must lie'):
    relative_position.shifted_window_mask(4, 4, window=2, shift=2)
