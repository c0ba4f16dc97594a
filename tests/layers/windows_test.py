"""Tests of `msba_jax.layers.windows`."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from msba_jax.layers import windows as windows_lib

SIDES = st.integers(1, 9)
DIRECTIONS = ['horizontal', 'vertical', 'diagonal', 'antidiagonal']


def stripes(height, width, direction, stripe):
  return windows_lib.stripe_windows(
    height, width, direction=direction, stripe=stripe
  )


def operations(function, *arguments):
  """How often a gather and a scatter stand in the traced function."""
  text = str(jax.make_jaxpr(function)(*arguments))
  return text.count(' gather['), text.count(' scatter-add[')


@hypothesis.given(height=SIDES, width=SIDES, window=SIDES, stride=SIDES)
def test_sliding_windows_cover_every_token(height, width, window, stride):
  stride = min(stride, window)
  windows = windows_lib.sliding_windows(
    height, width, window=window, stride=stride
  )
  assert set(windows.indices[windows.valid]) == set(range(height * width))
  for indices, valid in zip(windows.indices, windows.valid, strict=True):
    rows, columns = np.divmod(indices[valid], width)
    assert rows.max() - rows.min() < window
    assert columns.max() - columns.min() < window
    assert len(set(indices[valid])) == valid.sum()
    assert rows.min() % stride == 0
    assert columns.min() % stride == 0


@hypothesis.given(height=SIDES, width=SIDES, parts=st.integers(1, 4))
def test_partitions_are_adaptive_pooling(height, width, parts):
  windows = windows_lib.partition_windows(height, width, parts=parts)
  assert windows.indices.shape[0] == parts**2
  assert np.all(windows.valid.any(1))
  grid = np.arange(height * width).reshape(height, width)
  for i in range(parts):
    for j in range(parts):
      rows = slice(i * height // parts, -(-(i + 1) * height // parts))
      columns = slice(j * width // parts, -(-(j + 1) * width // parts))
      place = i * parts + j
      expected = grid[rows, columns].ravel()
      found = windows.indices[place][windows.valid[place]]
      np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('direction', DIRECTIONS)
@hypothesis.given(height=SIDES, width=SIDES, stripe=st.integers(1, 11))
def test_stripes_follow_their_equation(direction, height, width, stripe):
  windows = stripes(height, width, direction, stripe)
  side = max(height, width)
  lines = {'horizontal': height, 'vertical': width}.get(direction, side)
  length = height * width // lines
  stripe = min(stripe, lines)
  assert windows.indices.shape == (-(-lines // stripe), stripe * length)
  assert windows.tokens == height * width
  found = windows.indices[windows.valid]
  assert sorted(found) == list(range(height * width))
  for i, (indices, valid) in enumerate(
    zip(windows.indices, windows.valid, strict=True)
  ):
    rows, columns = np.divmod(indices[valid], width)
    line = {
      'horizontal': rows,
      'vertical': columns,
      'diagonal': (rows - columns) % side,
      'antidiagonal': (rows + columns) % side,
    }[direction]
    assert np.all(line // stripe == i)
    along = {
      'horizontal': columns,
      'vertical': rows,
    }.get(direction, rows if height <= width else columns)
    # Line by line, and in a line by position; what is filled up comes last.
    places = (line - i * stripe) * length + along
    np.testing.assert_array_equal(places, np.arange(valid.sum()))
    assert np.all(valid[: valid.sum()])


@hypothesis.given(height=SIDES, width=SIDES, stripe=SIDES)
def test_stripes_of_the_transposed_grid(height, width, stripe):
  """Columns are the rows of it, and a diagonal the other way round."""
  grid = np.arange(height * width).reshape(height, width)
  across = grid.T.ravel()
  rows = stripes(width, height, 'horizontal', stripe)
  columns = stripes(height, width, 'vertical', stripe)
  np.testing.assert_array_equal(
    across[rows.indices][rows.valid], columns.indices[columns.valid]
  )
  first = stripes(width, height, 'antidiagonal', stripe)
  second = stripes(height, width, 'antidiagonal', stripe)
  assert [set(across[x]) for x in first.indices[:-1]] == [
    set(x) for x in second.indices[:-1]
  ]


@pytest.mark.parametrize('direction', DIRECTIONS)
def test_a_stripe_wider_than_the_grid_is_all_of_it(direction):
  windows = stripes(3, 5, direction, 99)
  assert windows.indices.shape == (1, 15)
  assert windows.valid.all()


@hypothesis.given(
  height=SIDES, width=SIDES, stripe=SIDES, direction=st.sampled_from(DIRECTIONS)
)
def test_the_inverse_order_puts_tokens_back(height, width, stripe, direction):
  windows = stripes(height, width, direction, stripe)
  inverse = windows_lib.inverse_order(windows)
  assert np.all(windows.valid.ravel()[inverse])
  np.testing.assert_array_equal(
    windows.indices.ravel()[inverse], np.arange(height * width)
  )


def test_no_inverse_where_tokens_are_in_several_windows_or_in_none():
  overlapping = windows_lib.sliding_windows(3, 3, window=2, stride=1)
  assert windows_lib.inverse_order(overlapping) is None
  missing = windows_lib.Windows(
    np.array([[0, 2]]), np.array([[True, True]]), tokens=3
  )
  assert windows_lib.inverse_order(missing) is None


@hypothesis.given(
  height=SIDES, width=SIDES, stripe=SIDES, direction=st.sampled_from(DIRECTIONS)
)
def test_stripes_there_and_back(height, width, stripe, direction):
  windows = stripes(height, width, direction, stripe)
  tokens = np.random.default_rng(0).normal(size=(2, height * width, 3))
  tokens = jnp.asarray(tokens, jnp.float32)
  parts = windows_lib.window_partition(tokens, windows)
  expected = np.asarray(tokens)[:, windows.indices]
  expected[:, ~windows.valid] = 0
  np.testing.assert_array_equal(parts, expected)
  noise = jnp.where(windows.valid[None, ..., None], parts, 9.0)
  np.testing.assert_array_equal(
    windows_lib.window_merge(noise, windows), tokens
  )


@hypothesis.given(
  rows=st.integers(1, 4), columns=st.integers(1, 4), window=st.integers(1, 4)
)
def test_windows_that_divide_are_a_transposition(rows, columns, window):
  height, width = rows * window, columns * window
  windows = windows_lib.sliding_windows(
    height, width, window=window, stride=window
  )
  tokens = np.random.default_rng(0).normal(size=(2, height * width, 3))
  tokens = jnp.asarray(tokens, jnp.float32)
  parts = windows_lib.window_partition(tokens, windows)
  np.testing.assert_array_equal(parts, np.asarray(tokens)[:, windows.indices])
  merged = windows_lib.window_merge(parts, windows)
  np.testing.assert_array_equal(merged, tokens)


@pytest.mark.parametrize(
  ('windows', 'partition', 'merge'),
  [
    (stripes(4, 6, 'horizontal', 2), (0, 0), (0, 0)),
    (stripes(4, 6, 'vertical', 3), (0, 0), (0, 0)),
    (stripes(4, 6, 'diagonal', 2), (1, 0), (1, 0)),
    (stripes(5, 5, 'vertical', 2), (1, 0), (1, 0)),
    (windows_lib.partition_windows(4, 6, parts=2), (0, 0), (0, 0)),
    (
      windows_lib.sliding_windows(4, 4, window=2, stride=1), (1, 0), (0, 1),
    ),
  ],
)  # fmt: skip
def test_what_is_gathered_and_what_is_transposed(windows, partition, merge):
  tokens = jnp.zeros((1, windows.tokens, 2))
  found = operations(lambda x: windows_lib.window_partition(x, windows), tokens)
  assert found == partition
  values = jnp.zeros((1, *windows.indices.shape, 2))
  found = operations(lambda x: windows_lib.window_merge(x, windows), values)
  assert found == merge


@pytest.mark.parametrize('direction', ['vertical', 'diagonal'])
def test_gradients_of_stripes(rng, direction):
  windows = stripes(3, 3, direction, 2 if direction == 'diagonal' else 1)
  tokens = jnp.asarray(rng.normal(size=(1, 9, 2)), jnp.float32)

  @jax.jit
  def there_and_back(x):
    parts = windows_lib.window_partition(x, windows)
    return windows_lib.window_merge(parts**2, windows)

  check_grads(there_and_back, (tokens,), 1)


@pytest.mark.parametrize(
  ('height', 'width', 'window', 'stride'),
  [(4, 6, 2, 2), (5, 5, 3, 2), (3, 7, 4, 1), (2, 2, 5, 5)],
)
def test_merge_inverts_partition(variant, rng, height, width, window, stride):
  windows = windows_lib.sliding_windows(
    height, width, window=window, stride=stride
  )
  tokens = jnp.asarray(rng.normal(size=(2, height * width, 3)), jnp.float32)

  @variant
  def there_and_back(tokens):
    parts = windows_lib.window_partition(tokens, windows)
    return windows_lib.window_merge(parts, windows)

  np.testing.assert_allclose(there_and_back(tokens), tokens, rtol=1e-6)


def test_places_without_a_token_are_zero_and_do_not_merge(rng):
  windows = windows_lib.sliding_windows(3, 3, window=2, stride=2)
  tokens = jnp.asarray(rng.normal(size=(1, 9, 2)), jnp.float32)
  parts = windows_lib.window_partition(tokens, windows)
  assert np.all(np.asarray(parts[0])[~windows.valid] == 0)
  noise = jnp.where(windows.valid[None, ..., None], parts, 9.0)
  np.testing.assert_allclose(
    windows_lib.window_merge(noise, windows), tokens, rtol=1e-6
  )


def test_overlaps_are_averaged():
  windows = windows_lib.sliding_windows(1, 3, window=2, stride=1)
  values = jnp.asarray([[[[1.0], [2.0]], [[4.0], [6.0]]]])
  if windows.indices.shape == (2, 4):
    values = jnp.pad(values, ((0, 0), (0, 0), (0, 2), (0, 0)))
  merged = windows_lib.window_merge(values, windows)
  assert merged.ravel().tolist() == [1.0, 3.0, 6.0]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_dtype_and_gradient(rng, dtype):
  windows = windows_lib.sliding_windows(3, 3, window=2, stride=1)
  tokens = jnp.asarray(rng.normal(size=(1, 9, 2)), dtype)
  parts = windows_lib.window_partition(tokens, windows)
  assert parts.dtype == dtype
  assert windows_lib.window_merge(parts, windows).dtype == dtype
  if dtype == jnp.float32:
    check_grads(
      jax.jit(lambda x: windows_lib.window_merge(x**2, windows)), (parts,), 1
    )


@pytest.mark.usefixtures('unchecked')
def test_errors_name_the_sizes(rng):
  with pytest.raises(ValueError, match='stride=3 must be at most window=2'):
    windows_lib.sliding_windows(4, 4, window=2, stride=3)
  with pytest.raises(ValueError, match='must be positive: height=0'):
    windows_lib.partition_windows(0, 4, parts=2)
  windows = windows_lib.sliding_windows(4, 4, window=2, stride=2)
  with pytest.raises(ValueError, match='belong to 16 tokens, not to 9'):
    windows_lib.window_partition(jnp.zeros((1, 9, 2)), windows)
  with pytest.raises(ValueError, match='does not hold windows of'):
    windows_lib.window_merge(jnp.zeros((1, 3, 4, 2)), windows)
  with pytest.raises(ValueError, match=r'must be positive: .* stripe=0'):
    stripes(4, 4, 'vertical', 0)
  with pytest.raises(ValueError, match="direction='up' must be one of"):
    stripes(4, 4, 'up', 1)
