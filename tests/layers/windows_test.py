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
