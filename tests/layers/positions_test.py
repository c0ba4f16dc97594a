"""Tests of the resampling of positions."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from msba_jax.layers import positions


def kernel(x, a):
  x = abs(x)
  if x < 1:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1
  return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resampled(row, goal, antialias):
  """One axis, place by place, in float64."""
  scale = len(row) / goal
  width = max(scale, 1.0) if antialias else 1.0
  result = []
  for i in range(goal):
    center = (i + 0.5) * scale - 0.5
    total = norm = 0.0
    for j in range(
      math.floor(center - 2 * width), math.ceil(center + 2 * width) + 1
    ):
      weight = kernel((j - center) / width, -0.5 if antialias else -0.75)
      if antialias and not 0 <= j < len(row):
        continue
      total += weight * row[min(max(j, 0), len(row) - 1)]
      norm += weight
    result.append(total / norm if antialias else total)
  return np.array(result)


@hypothesis.given(
  size=st.integers(1, 9), goal=st.integers(1, 9), antialias=st.booleans()
)
def test_an_axis_is_resampled_place_by_place(size, goal, antialias):
  row = np.random.default_rng(size).normal(size=size)
  weights = positions.cubic_weights(size, goal, antialias=antialias)
  np.testing.assert_allclose(
    weights @ row, resampled(row, goal, antialias), atol=1e-5
  )
  np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize('antialias', [False, True])
def test_a_table_is_resampled_along_both_axes(variant, rng, antialias):
  table = rng.normal(size=(4, 3, 2))
  resize = variant(
    lambda x: positions.resize_positions(x, (6, 2), antialias=antialias)
  )
  rows = np.apply_along_axis(lambda x: resampled(x, 6, antialias), 0, table)
  expected = np.apply_along_axis(lambda x: resampled(x, 2, antialias), 1, rows)
  result = resize(jnp.asarray(table, jnp.float32))
  np.testing.assert_allclose(result, expected, atol=1e-5)


def test_the_grid_that_it_is_for_keeps_the_table_bit_by_bit(rng):
  table = jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32)
  np.testing.assert_array_equal(
    positions.resize_positions(table, (3, 4)), table
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_dtype_stays(rng, dtype):
  table = jnp.asarray(rng.normal(size=(2, 2, 3)), dtype)
  assert positions.resize_positions(table, (3, 5)).dtype == dtype


def test_the_gradient_is_that_of_finite_differences(rng):
  table = jnp.asarray(rng.normal(size=(2, 3, 2)), jnp.float32)
  check_grads(
    jax.jit(lambda x: positions.resize_positions(x, (3, 2), antialias=True)),
    (table,),
    order=2,
    modes=['rev'],
    atol=1e-2,
    rtol=1e-2,
  )


def test_an_empty_grid_is_refused(rng):
  table = jax.device_put(rng.normal(size=(2, 2, 1)).astype(np.float32))
  with pytest.raises(ValueError, match=r'grid=\(0, 2\) must have at least'):
    positions.resize_positions(table, (0, 2))
