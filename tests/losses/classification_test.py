"""Tests of `msba_jax.losses.classification`; see also `properties_test`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msba_jax.losses import classification


@pytest.fixture
def logits(rng):
  return jnp.asarray(5 * rng.normal(size=(4, 3)), jnp.float32)


LABELS = jnp.array([0, 2, 1, 1])


@pytest.mark.parametrize('smoothing', [0, 0.1, 1.0])
def test_equals_optax(logits, smoothing):
  targets = optax.smooth_labels(jax.nn.one_hot(LABELS, 3), smoothing)
  np.testing.assert_allclose(
    classification.label_smoothed_cross_entropy(
      logits, LABELS, smoothing=smoothing
    ),
    optax.softmax_cross_entropy(logits, targets),
    rtol=1e-5,
  )


def test_huge_logits_stay_finite(logits):
  loss = classification.label_smoothed_cross_entropy

  def total(z):
    return loss(z, LABELS).sum()

  for size in (1e4, 1e30):
    value, gradient = jax.value_and_grad(total)(size * logits)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


@pytest.mark.usefixtures('unchecked')
def test_misuse_is_named(logits):
  loss = classification.label_smoothed_cross_entropy
  with pytest.raises(ValueError, match=r'smoothing=1\.5 must lie between'):
    loss(logits, LABELS, smoothing=1.5)
  with pytest.raises(ValueError, match='one per embedding'):
    loss(logits, LABELS[:2])
