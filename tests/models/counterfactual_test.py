"""Counterfactual attention, and regions of weights that say nothing."""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.layers.interventions import (
  counterfactual_attention,
  leave_one_out_effect,
)
from msba_jax.models.bcp import BidirectionalContext
from msba_jax.models.context import Context, batch
from msba_jax.models.counterfactual import CounterfactualAttention
from tests.layers.causal_test import softmax

KINDS = ('permuted', 'uniform', 'random')


@pytest.fixture
def given(rng):
  """Weights (b, h, n, m), values, and the mask that made the weights."""
  mask = rng.random((4, 5)) < 0.6
  mask[:, 0], mask[:, 3], mask[2] = True, False, False
  scores = np.where(mask, 2 * rng.normal(size=(3, 2, 4, 5)), -np.inf)
  with np.errstate(invalid='ignore'):
    weights = np.nan_to_num(softmax(scores))
  return (
    jnp.asarray(weights, jnp.float32),
    jnp.asarray(rng.normal(size=(3, 5, 2, 6)), jnp.float32),
    jnp.asarray(mask),
  )


def test_it_begins_with_what_was_asked_for(given):
  module = CounterfactualAttention(mix=0.8, temperature=0.5)
  params = module.init(jax.random.key(0), *given)['params']
  assert set(params) == {'mix', 'temperature'}
  assert jax.nn.sigmoid(params['mix']) == pytest.approx(0.8)
  assert jax.nn.softplus(params['temperature']) == pytest.approx(0.5)


def test_it_equals_its_function(given, variant):
  weights, values, mask = given
  params = {'mix': jnp.array(-0.4), 'temperature': jnp.array(0.7)}
  found = variant(CounterfactualAttention().apply)({'params': params}, *given)
  expected = counterfactual_attention(
    weights,
    leave_one_out_effect(weights, values),
    temperature=jax.nn.softplus(0.7),
    mix=jax.nn.sigmoid(-0.4),
    mask=mask,
  )
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert np.abs(found - weights).max() > 0.05
  found, mask = np.asarray(found), np.asarray(mask)
  assert np.all(found[..., ~mask] == 0)
  np.testing.assert_allclose(
    found.sum(axis=-1), np.broadcast_to(mask.any(axis=1), (3, 2, 4)), atol=1e-6
  )


def test_without_a_share_the_weights_are_left(given):
  params = {'mix': jnp.array(40.0), 'temperature': jnp.array(0.7)}
  found = CounterfactualAttention().apply({'params': params}, *given)
  np.testing.assert_array_equal(found, given[0])


def test_effects_are_measured_and_not_trained(given):
  weights, values, mask = given
  params = {'mix': jnp.array(-0.4), 'temperature': jnp.array(0.7)}
  rng = np.random.default_rng(1)
  factors = jnp.asarray(rng.normal(size=weights.shape), jnp.float32)

  def total(params, weights, values):
    found = CounterfactualAttention().apply(
      {'params': params}, weights, values, mask
    )
    return jnp.sum(found * factors)

  of_params, of_weights, of_values = jax.jit(jax.grad(total, (0, 1, 2)))(
    params, weights, values
  )
  np.testing.assert_array_equal(of_values, 0)
  np.testing.assert_allclose(
    of_weights, jax.nn.sigmoid(-0.4) * factors, rtol=1e-6
  )
  for leaf in jax.tree.leaves(of_params):
    assert np.abs(leaf) > 1e-3


@functools.cache
def stage(kind):
  """`apply(params, regions, context, key)` of a stage with this contrast."""
  module = BidirectionalContext(2, contrast=kind)

  @jax.jit
  def apply(params, regions, context, key):
    rngs = None if key is None else {'dropout': key}
    return module.apply({'params': params}, regions, context, rngs=rngs)

  return apply


@functools.cache
def parameters():
  """Of the stage, for regions of width 4; none is a special value."""
  params = jax.jit(BidirectionalContext(2).init)(
    jax.random.key(0), jnp.zeros((2, 3, 2, 4)), batch(jnp.ones(3, bool))
  )['params']
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  leaves = [x + 0.5 * rng.normal(size=x.shape).astype('f4') for x in leaves]
  return jax.tree.unflatten(tree, leaves)


@pytest.fixture
def regions(rng):
  return jnp.asarray(rng.normal(size=(2, 5, 2, 4)), jnp.float32)


EVERYONE = jnp.ones(5, bool)


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_says_something_else(regions, kind):
  key = jax.random.key(3)
  plain, without = stage(kind)(parameters(), regions, batch(EVERYONE), None)
  assert 'counterfactual' not in without
  updated, aux = stage(kind)(parameters(), regions, batch(EVERYONE), key)
  np.testing.assert_allclose(updated, plain, atol=1e-6)
  found = aux['counterfactual']
  chex.assert_equal_shape([found, updated])
  chex.assert_tree_all_finite(found)
  assert np.abs(found - updated).max() > 0.01
  _, again = stage(kind)(parameters(), regions, batch(EVERYONE), key)
  np.testing.assert_array_equal(again['counterfactual'], found)
  _, other = stage(kind)(
    parameters(), regions, batch(EVERYONE), jax.random.key(4)
  )
  moved = np.abs(other['counterfactual'] - found).max()
  assert (moved < 1e-6) == (kind == 'uniform')


def test_no_contrast_without_being_asked_for(regions):
  _, aux = stage(None)(
    parameters(), regions, batch(EVERYONE), jax.random.key(3)
  )
  assert set(aux) == {'attention'}


def test_the_permuted_contrast_reads_other_images(regions):
  """It is the stage with foreign images whose values changed places."""
  everyone = Context(regions[:, ::-1], EVERYONE)
  module = BidirectionalContext(2, contrast='permuted')
  key = jax.random.key(3)

  def values_moved(order):
    def move(next_function, arguments, keywords, context):
      out = next_function(*arguments, **keywords)
      foreign = context.module.name == 'values' and len(moved) == 1
      moved.extend([context.module.name] * (context.module.name == 'values'))
      return out[jnp.asarray(order)] if foreign else out

    moved = []
    with nn.intercept_methods(move):
      return module.apply({'params': parameters()}, regions, everyone)[0]

  _, aux = stage('permuted')(parameters(), regions, everyone, key)
  errors = [
    np.abs(values_moved(order) - aux['counterfactual']).max()
    for order in itertools.permutations(range(5))
  ]
  assert np.sum(np.asarray(errors) < 1e-5) == 1
  assert np.argmin(errors) != 0


@pytest.mark.parametrize('kind', ['batch', 'memory'])
def test_the_uniform_contrast_is_attention_without_scores(regions, kind):
  """All alike: what the stage does where queries and keys are zero."""
  context = batch(EVERYONE.at[1].set(False))
  if kind == 'memory':
    context = Context(regions[:, ::-1], EVERYONE.at[1].set(False))
  _, aux = stage('uniform')(parameters(), regions, context, jax.random.key(0))
  blind = parameters() | {
    'queries_keys': jax.tree.map(jnp.zeros_like, parameters()['queries_keys'])
  }
  expected, _ = stage('uniform')(blind, regions, context, None)
  np.testing.assert_allclose(aux['counterfactual'], expected, atol=2e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_a_masked_image_has_no_influence_on_the_contrast(regions, kind):
  valid = EVERYONE.at[3].set(False)

  @jax.jit
  @jax.grad
  def gradient(regions):
    _, aux = stage(kind)(parameters(), regions, batch(valid), jax.random.key(3))
    kept = jnp.where(valid[:, None, None], aux['counterfactual'][0], 0)
    return jnp.sum(kept**3)

  found = np.abs(np.asarray(gradient(regions))).max((0, 2, 3))
  assert found[3] == 0
  assert np.all(found[np.asarray(valid)] > 0)


@pytest.mark.parametrize('kind', KINDS)
def test_nobody_to_see_changes_nothing(regions, kind):
  updated, aux = stage(kind)(
    parameters(), regions, batch(~EVERYONE), jax.random.key(3)
  )
  np.testing.assert_array_equal(aux['counterfactual'], regions)
  np.testing.assert_array_equal(updated, regions)
