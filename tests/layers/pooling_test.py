"""Tests of `msba_jax.layers.pooling`."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from msba_jax.layers import pooling


def reference(inputs, power, mask=None):
  inputs = np.asarray(inputs, np.float64)
  positive = np.logaddexp(inputs, 0) + 1e-6
  mask = np.ones(inputs.shape[:-1], bool) if mask is None else np.asarray(mask)
  out = np.zeros((*inputs.shape[:-2], inputs.shape[-1]))
  for place in np.ndindex(*inputs.shape[:-2]):
    kept = positive[place][mask[place]]
    if len(kept):
      out[place] = np.mean(kept**power, axis=0) ** (1 / power)
  return out


@hypothesis.given(
  t=st.sampled_from([1, 2, 5]),
  d=st.sampled_from([1, 4]),
  power=st.sampled_from([0.5, 1.0, 3.0, 8.0]),
  size=st.sampled_from([0.1, 1.0, 5.0]),
  seed=st.integers(0, 99),
)
def test_equals_the_reference(t, d, power, size, seed):
  rng = np.random.default_rng(seed)
  inputs = jnp.asarray(size * rng.normal(size=(3, t, d)), jnp.float32)
  mask = jnp.asarray(rng.random((3, t)) < 0.5)
  np.testing.assert_allclose(
    pooling.generalized_mean_pool(inputs, power),
    reference(inputs, power),
    rtol=2e-5,
  )
  np.testing.assert_allclose(
    pooling.generalized_mean_pool(inputs, power, mask=mask),
    reference(inputs, power, mask),
    rtol=2e-5,
  )


def test_one_power_a_feature(variant, rng):
  inputs = jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32)
  power = jnp.array([1.0, 2.0, 6.0])
  np.testing.assert_allclose(
    variant(pooling.generalized_mean_pool)(inputs, power),
    reference(inputs, np.asarray(power)),
    rtol=1e-5,
  )


def test_order_of_tokens_does_not_matter(rng):
  inputs = jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32)
  np.testing.assert_allclose(
    pooling.generalized_mean_pool(inputs),
    pooling.generalized_mean_pool(inputs[:, rng.permutation(5)]),
    rtol=1e-6,
  )


def test_empty_rows_are_zero_and_masked_tokens_get_no_gradient(variant, rng):
  inputs = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
  mask = jnp.array([[False] * 4, [True, True, False, True]])

  def total(inputs, power):
    return jnp.sum(pooling.generalized_mean_pool(inputs, power, mask=mask))

  pooled = pooling.generalized_mean_pool(inputs, mask=mask)
  assert np.all(np.asarray(pooled[0]) == 0)
  gradient, power = variant(jax.grad(total, (0, 1)))(inputs, jnp.float32(3))
  chex.assert_tree_all_finite((gradient, power))
  assert np.all(np.asarray(gradient[0]) == 0)
  assert np.all(np.asarray(gradient[1, 2]) == 0)
  assert np.all(np.asarray(gradient[1, 0]) > 0)


def test_gradients_equal_finite_differences(rng):
  inputs = jnp.asarray(rng.normal(size=(1, 4, 2)), jnp.float32)
  check_grads(
    jax.jit(pooling.generalized_mean_pool),
    (inputs, jnp.float32(3)),
    1,
    rtol=2e-2,
    atol=2e-2,
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_extremes_stay_finite(dtype):
  inputs = jnp.asarray([[[-1e4], [0.0], [1e4]]], dtype)
  pooled = pooling.generalized_mean_pool(inputs, 50.0)
  chex.assert_tree_all_finite(pooled)
  assert pooled.dtype == dtype


def test_regions_do_not_depend_on_the_grid():
  for height, width in [(1, 1), (2, 3), (8, 8), (7, 5)]:
    partition = pooling.region_partition(height, width)
    assert sum(len(part.indices) for part in partition) == 14
    assert all(part.valid.any(1).all() for part in partition)


@pytest.mark.usefixtures('unchecked')
def test_errors(rng):
  with pytest.raises(ValueError, match='at least one partition'):
    pooling.region_partition(4, 4, parts=())
  with pytest.raises(ValueError, match='power must be a scalar'):
    pooling.generalized_mean_pool(jnp.ones((2, 3)), jnp.ones((1, 3)))


@pytest.mark.parametrize('power', [0.5, 3.0, 8.0])
@pytest.mark.parametrize('shape', [(8, 8), (3, 5), (1, 2)])
def test_windows_equal_pooling_each_of_them(variant, rng, power, shape):
  windows = pooling.region_partition(*shape)
  inputs = jnp.asarray(3 * rng.normal(size=(2, shape[0] * shape[1], 3)), 'f4')

  def pool(inputs, power):
    return pooling.generalized_mean_windows(inputs, windows, power)

  found = variant(pool)(inputs, jnp.float32(power))
  expected = [
    reference(inputs[:, np.asarray(indices)[valid]], power)
    for part in windows
    for indices, valid in zip(part.indices, part.valid, strict=True)
  ]
  np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=3e-5)


def test_windows_have_the_gradients_of_pooling(rng):
  windows = pooling.region_partition(2, 3)
  inputs = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)

  @jax.jit
  def pool(inputs, power):
    return pooling.generalized_mean_windows(inputs, windows, power)

  check_grads(pool, (inputs, jnp.array([2.0, 4.0])), 1, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_windows_of_extremes_stay_finite(dtype):
  inputs = jnp.array([[-200.0], [-30.0], [0.0], [400.0]], dtype)
  windows = pooling.region_partition(2, 2)

  def total(inputs):
    return pooling.generalized_mean_windows(inputs, windows, 3.0).sum()

  value, gradient = jax.value_and_grad(total)(inputs)
  chex.assert_tree_all_finite((value, gradient))
  assert gradient.dtype == dtype


def test_windows_of_another_grid(rng):
  with pytest.raises(ValueError, match='do not fit'):
    pooling.generalized_mean_windows(
      jnp.zeros((5, 2)), pooling.region_partition(2, 2)
    )
