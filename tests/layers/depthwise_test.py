"""Tests of `msba_jax.layers.depthwise`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from msba_jax.layers.depthwise import depthwise_convolution


def reference(grid, kernel):
  grid, kernel = (np.asarray(x, np.float64) for x in (grid, kernel))
  out = np.zeros_like(grid)
  _, height, width, _ = grid.shape
  rows, columns = kernel.shape[:2]
  for y, x, a, b in np.ndindex(height, width, rows, columns):
    from_y, from_x = y + a - rows // 2, x + b - columns // 2
    if 0 <= from_y < height and 0 <= from_x < width:
      out[:, y, x] += grid[:, from_y, from_x] * kernel[a, b, 0]
  return out


def drawn(rng, shape, sides, dtype=jnp.float32):
  grid = jnp.asarray(rng.normal(size=shape), dtype)
  return grid, jnp.asarray(rng.normal(size=(*sides, 1, shape[-1])), jnp.float32)


@pytest.mark.parametrize('sides', [(1, 1), (3, 3), (3, 5), (7, 1)])
@pytest.mark.parametrize('shape', [(2, 5, 4, 3), (1, 1, 1, 2), (2, 2, 7, 1)])
def test_equals_the_reference(variant, rng, shape, sides):
  grid, kernel = drawn(rng, shape, sides)
  np.testing.assert_allclose(
    variant(depthwise_convolution)(grid, kernel),
    reference(grid, kernel),
    atol=1e-5,
  )


def test_equals_the_library(rng):
  grid, kernel = drawn(rng, (2, 6, 5, 4), (3, 3))

  def library(grid, kernel):
    return jax.lax.conv_general_dilated(
      grid,
      kernel,
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=4,
    )

  ours, theirs = (
    jax.vjp(function, grid, kernel)
    for function in (depthwise_convolution, library)
  )
  np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
  for found, wanted in zip(ours[1](grid), theirs[1](grid), strict=True):
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_gradients_equal_finite_differences(rng):
  convolve = jax.jit(depthwise_convolution)
  check_grads(convolve, drawn(rng, (1, 3, 4, 2), (3, 3)), 1, rtol=2e-2)


def test_half_precision_adds_in_single(rng):
  grid, kernel = drawn(rng, (2, 6, 6, 4), (3, 3), jnp.bfloat16)
  found = depthwise_convolution(grid, kernel)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(found, np.float64), reference(grid, kernel), rtol=1e-2, atol=1e-3
  )


def test_an_even_kernel_is_refused(rng):
  with pytest.raises(ValueError, match='must be odd'):
    depthwise_convolution(*drawn(rng, (1, 4, 4, 2), (3, 2)))
