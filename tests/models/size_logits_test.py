"""Choosing among sizes that have an order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.size_logits import SizeLogits
from tests.models.conftest import perturbed

SIZES = (0.125, 0.25, 0.5, 1.0)


def scores(inputs, prior=None, *, sizes=SIZES, spread=0.0):
  """Scores, and z recovered from the scores of the first two sizes."""
  module = SizeLogits(6, sizes)
  variables = module.init(jax.random.key(0), inputs)
  if spread:
    variables = perturbed(variables, spread)
  found = np.asarray(module.apply(variables, inputs, prior), np.float64)
  first, second = np.log2(sizes[:2])
  # −2 ((c₁ − z)² − (c₂ − z)²) is linear in z.
  apart = (found[..., 0] - found[..., 1]) / -2
  wanted = (first**2 - second**2 - apart) / (2 * (first - second))
  return found, wanted


def test_scores_fall_off_from_one_number(rng):
  inputs = jnp.asarray(rng.normal(size=(50, 3)), jnp.float32)
  found, wanted = scores(inputs, spread=0.3)
  expected = -2 * (np.log2(SIZES) - wanted[:, None]) ** 2
  np.testing.assert_allclose(found, expected, atol=1e-3)
  assert wanted.std() > 0.1
  assert wanted.min() > -3.5 - 1e-3
  assert wanted.max() < 0.5 + 1e-3
  nearest = np.abs(np.log2(SIZES) - wanted[:, None]).argmin(axis=1)
  np.testing.assert_array_equal(found.argmax(axis=1), nearest)
  assert len(set(nearest.tolist())) > 1


def test_it_begins_with_the_prior_or_the_middle():
  inputs = jnp.zeros((4, 3))
  np.testing.assert_allclose(scores(inputs)[1], -1.5, atol=1e-5)
  prior = jnp.array([-2.0, -1.5, -1.0, -9.0])
  wanted = scores(inputs, prior)[1]
  expected = -1.5 + 2 * np.tanh((np.asarray(prior) + 1.5) / 2)
  np.testing.assert_allclose(wanted, expected, atol=1e-5)


@pytest.mark.parametrize('far', [-3.0, 3.0])
def test_a_choice_can_be_taken_back(far):
  """Scores of the two sizes at an end still pull where z has gone there."""
  module = SizeLogits(6, SIZES)
  inputs = jnp.ones((1, 3))
  variables = module.init(jax.random.key(0), inputs)

  def expected_size(prior):
    logits = module.apply(variables, inputs, prior)
    return jnp.sum(jax.nn.softmax(logits) * jnp.asarray(SIZES)[None])

  slope = jax.grad(expected_size)(jnp.array([far - 1.5]))
  assert slope.item() > 1e-4
