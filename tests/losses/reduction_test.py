"""Tests of `msba_jax.losses.reduction`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.losses import reduction

LABELS = jnp.array([0, 0, 1, 1, 2])
VALID = jnp.array([True, True, True, False, True])
LOSSES = jnp.array([1.0, 3.0, 5.0, jnp.nan, 8.0])


def test_masked_mean_ignores_what_is_left_out(variant):
  values = jnp.array([[1.0, jnp.nan], [3.0, jnp.inf]])
  mask = jnp.array([[True, False], [True, False]])
  mean, gradient = variant(jax.value_and_grad(reduction.masked_mean))(
    values, mask
  )
  assert mean == 2
  np.testing.assert_array_equal(gradient, mask * 0.5)
  nothing, gradient = variant(jax.value_and_grad(reduction.masked_mean))(
    values, ~mask & mask
  )
  assert nothing == 0
  assert not np.any(np.asarray(gradient))


def test_masked_mean_of_all_in_float32():
  mean = reduction.masked_mean(jnp.asarray([1.0, 1.0078125], jnp.bfloat16))
  assert mean.dtype == jnp.float32
  assert mean == 1.00390625


def test_means_over_images_and_anchors():
  assert reduction.mean_over_images(LOSSES, LABELS, VALID) == 17 / 4
  # Only the first two have a valid positive.
  assert reduction.mean_over_anchors(LOSSES, LABELS, VALID) == 2
  nothing = jnp.zeros(5, bool)
  assert reduction.mean_over_anchors(LOSSES, LABELS, nothing) == 0


def test_means_over_pairs_and_proxies(rng):
  table = jnp.asarray(rng.normal(size=(5, 5)), jnp.float32)
  np.testing.assert_allclose(
    reduction.mean_over_positive_pairs(table, LABELS, VALID),
    (table[0, 1] + table[1, 0]) / 2,
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    reduction.mean_over_proxies(table[0], LABELS, VALID),
    table[0].mean(),
    rtol=1e-6,
  )
  wide = jnp.where(VALID[:, None], table[:, :3], 0)
  np.testing.assert_allclose(
    reduction.sum_over_pairs_per_image(wide, LABELS, VALID),
    wide.sum() / 4,
    rtol=1e-5,
  )


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('size', [1.0, 1e4])
def test_masked_log_sum_exp(rng, axis, size):
  scores = size * rng.normal(size=(4, 5))
  mask = rng.random((4, 5)) < 0.6
  mask[1], mask[:, 2] = False, False
  with np.errstate(divide='ignore'):
    expected = np.logaddexp.reduce(np.where(mask, scores, -np.inf), axis=axis)
  alive = mask.any(axis)
  scores, mask = jnp.asarray(scores, jnp.float32), jnp.asarray(mask)
  total, some = reduction.masked_log_sum_exp(scores, mask, axis=axis)
  np.testing.assert_array_equal(some, alive)
  np.testing.assert_allclose(total, np.where(alive, expected, 0), rtol=1e-5)
  soft = reduction.masked_log_one_plus_sum_exp(scores, mask, axis=axis)
  np.testing.assert_allclose(
    soft, np.where(alive, np.logaddexp(0, expected), 0), rtol=1e-5
  )


def test_masked_log_sum_exp_of_nothing_has_no_gradient(variant):
  scores = jnp.array([[1.0, 1e30], [2.0, jnp.nan]])
  mask = jnp.array([[True, False], [False, False]])

  def total(scores):
    soft = reduction.masked_log_one_plus_sum_exp(scores, mask)
    return soft.sum() + reduction.masked_log_sum_exp(scores, mask)[0].sum()

  gradient = np.asarray(variant(jax.grad(total))(scores))
  assert np.all(gradient[~np.asarray(mask)] == 0)
  assert gradient[0, 0] > 1


@pytest.mark.usefixtures('unchecked')
def test_misuse_is_named():
  with pytest.raises(ValueError, match=r'must agree.*\(2,\).*\(5,\)'):
    reduction.masked_mean(LOSSES, VALID[:2])
  with pytest.raises(TypeError, match='mask must be Boolean'):
    reduction.masked_mean(LOSSES, LABELS)
  for mean in (reduction.mean_over_images, reduction.mean_over_anchors):
    with pytest.raises(ValueError, match='choose another reduction'):
      mean(LOSSES[:3], LABELS, VALID)
  with pytest.raises(ValueError, match='one row per image'):
    reduction.sum_over_pairs_per_image(LOSSES, LABELS, VALID)
