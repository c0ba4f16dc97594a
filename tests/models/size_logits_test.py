"""Choosing among sizes that have an order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.size_logits import NeededSize, SizeLogits
from tests.models.conftest import perturbed

SIZES = (0.125, 0.25, 0.5, 1.0)


def scores(module, *inputs, spread=0.0):
  """Scores, and z recovered from the scores of the first two sizes."""
  sizes = module.candidates
  variables = module.init(jax.random.key(0), *inputs)
  if spread:
    variables = perturbed(variables, spread)
  found = np.asarray(module.apply(variables, *inputs), np.float64)
  first, second = np.log2(sizes[:2])
  # −2 ((c₁ − z)² − (c₂ − z)²) is linear in z.
  apart = (found[..., 0] - found[..., 1]) / -2
  wanted = (first**2 - second**2 - apart) / (2 * (first - second))
  return found, wanted


def test_scores_fall_off_from_one_number(rng):
  inputs = jnp.asarray(rng.normal(size=(50, 3)), jnp.float32)
  module = SizeLogits(6, SIZES)
  found, wanted = scores(module, inputs, jnp.full(50, -1.5), spread=0.3)
  expected = -2 * (np.log2(SIZES) - wanted[:, None]) ** 2
  np.testing.assert_allclose(found, expected, atol=1e-3)
  assert wanted.std() > 0.1
  assert wanted.min() > -3.5 - 1e-3
  assert wanted.max() < 0.5 + 1e-3
  nearest = np.abs(np.log2(SIZES) - wanted[:, None]).argmin(axis=1)
  np.testing.assert_array_equal(found.argmax(axis=1), nearest)
  assert len(set(nearest.tolist())) > 1


def test_it_begins_with_the_prior():
  prior = jnp.array([-2.0, -1.5, -1.0, -9.0])
  wanted = scores(SizeLogits(6, SIZES), jnp.zeros((4, 3)), prior)[1]
  expected = -1.5 + 2 * np.tanh((np.asarray(prior) + 1.5) / 2)
  np.testing.assert_allclose(wanted, expected, atol=1e-5)


@pytest.mark.parametrize('far', [-3.0, 3.0])
def test_a_choice_can_be_taken_back(far):
  """Scores of the two sizes at an end still pull where z has gone there."""
  module = SizeLogits(6, SIZES)
  inputs = jnp.ones((1, 3))
  variables = module.init(jax.random.key(0), inputs, jnp.zeros(1))

  def expected_size(prior):
    logits = module.apply(variables, inputs, prior)
    return jnp.sum(jax.nn.softmax(logits) * jnp.asarray(SIZES)[None])

  slope = jax.grad(expected_size)(jnp.array([far - 1.5]))
  assert slope.item() > 1e-4


def test_what_is_lost_says_which_size_is_needed(rng):
  lost = jnp.asarray(rng.uniform(0, 1, (30, 2)), jnp.float32)
  told = np.log(np.asarray(lost, np.float64) + 1e-3) / 2 + 1
  wanted = scores(NeededSize((1.0, 2.0, 4.0)), lost)[1]
  expected = 1 + 1.5 * np.tanh(told.mean(axis=1) / 1.5)
  np.testing.assert_allclose(wanted, expected, atol=1e-4)


def test_who_loses_more_never_gets_less(rng):
  lost = jnp.asarray(rng.uniform(0, 0.5, (30, 2)), jnp.float32)
  module = NeededSize((1.0, 2.0, 4.0))
  for i in range(2):
    less, more = (
      scores(module, x, spread=3.0)[1] for x in (lost, lost.at[:, i].add(0.1))
    )
    assert np.all(more >= less - 1e-5)
  # Two numbers that are learned, and a third for all.
  params = module.init(jax.random.key(0), lost)

  def expected_size(params):
    likely = jax.nn.softmax(module.apply(params, lost))
    return jnp.sum(likely @ jnp.array([1.0, 2.0, 4.0]))

  for leaf in jax.tree.leaves(jax.grad(expected_size)(params)):
    assert np.all(np.asarray(leaf) != 0)
