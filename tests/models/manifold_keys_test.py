"""Tests of `msba_jax.models.manifold_keys`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.layers.manifold import (
  ManifoldParams,
  manifold_keys,
  membership_penalty,
)
from msba_jax.models.manifold_keys import ManifoldKeys, activation_gain

VARIANTS = 'vanilla', 'simple', 'unbalanced_atlas', 'spatial'
BUDGETS = 'equal', 'full'
# A plain key projection of 768 features has 589,824 weights and 768 biases.
COUNTS = {
  ('vanilla', 'equal'): 589_824 + 8 * 768 + 768,
  ('simple', 'equal'): 589_824 + 2 * 8 * 768,
  ('unbalanced_atlas', 'equal'): 589_824 + 3 * 8 * 768,
  ('spatial', 'equal'): 589_824 + 3 * 8 * 768 + 72,
  ('vanilla', 'full'): 9_449_472,
  ('simple', 'full'): 4_730_880,
  ('unbalanced_atlas', 'full'): 4_730_880 + 8 * 768,
  ('spatial', 'full'): 4_730_880 + 8 * 768 + 72,
}


def make(variant, features, grid, **options):
  place = {'grid': grid} if variant == 'spatial' else {}
  return ManifoldKeys(features, variant, **place, **options)


@pytest.mark.parametrize(('variant', 'budget'), COUNTS)
def test_the_number_of_parameters(variant, budget):
  inputs = jax.ShapeDtypeStruct((1, 6, 768), jnp.float32)
  module = make(variant, 768, (2, 3), budget=budget)
  variables = jax.eval_shape(module.init, jax.random.key(0), inputs)
  assert set(variables) == {'params'}
  count = sum(x.size for x in jax.tree.leaves(variables))
  assert count == COUNTS[variant, budget]


@pytest.mark.parametrize('budget', BUDGETS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_keys_begin_with_the_spread_of_plain_ones(rng, variant, budget):
  inputs = jnp.asarray(rng.normal(size=(8, 16, 64)), jnp.float32)
  module = make(variant, 64, (4, 4), budget=budget)
  keys, variables = jax.jit(module.init_with_output)(jax.random.key(0), inputs)
  plain, _ = nn.Dense(64).init_with_output(jax.random.key(1), inputs)
  assert keys.shape == plain.shape
  assert 0.7 < np.std(keys) / np.std(plain) < 1.3
  # A constant in all keys would change no attention: the spread over tokens.
  spread = np.sqrt(np.var(keys, axis=(0, 1)).mean())
  assert 0.85 < spread / np.sqrt(np.var(plain, axis=(0, 1)).mean()) < 1.15
  params = variables['params']
  assert np.all(np.asarray(params['biases']) == 0)
  np.testing.assert_allclose(np.mean(params['scales']), 1, atol=0.005)
  np.testing.assert_allclose(np.std(params['scales']), 0.02, rtol=0.15)


@pytest.mark.parametrize('variant', VARIANTS)
def test_equals_the_pure_function(rng, variant):
  inputs = jnp.asarray(rng.normal(size=(2, 7, 8)), jnp.float32)
  place = {'grid': (2, 3), 'prefix': 1} if variant == 'spatial' else {}
  module = ManifoldKeys(
    6, variant, 2, activation=jnp.tanh, broadcast_context=True, **place
  )
  variables = jax.jit(module.init)(jax.random.key(0), inputs)
  keys, sown = jax.jit(
    lambda *given: module.apply(*given, mutable=['intermediates', 'penalties'])
  )(variables, inputs)
  expected = manifold_keys(
    inputs,
    ManifoldParams(**variables['params']),
    variant=variant,
    activation=jnp.tanh,
    broadcast_context=True,
    **place,
  )
  np.testing.assert_allclose(keys, expected.keys, rtol=1e-5, atol=1e-6)
  if expected.memberships is None:
    assert not sown
    return
  (memberships,) = sown['intermediates']['memberships']
  np.testing.assert_allclose(memberships, expected.memberships, rtol=1e-5)
  assert ('penalties' in sown) == (variant == 'unbalanced_atlas')
  if variant == 'unbalanced_atlas':
    (penalty,) = sown['penalties']['membership']
    mean = jnp.mean(membership_penalty(memberships))
    np.testing.assert_allclose(penalty, mean, rtol=1e-5)
    assert penalty < 0


@pytest.mark.parametrize('weight', [0.0, -0.5])
def test_the_penalty_has_a_weight(rng, weight):
  inputs = jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32)
  module = ManifoldKeys(6, 'unbalanced_atlas', 2, penalty=weight)
  variables = module.init(jax.random.key(0), inputs)
  _, sown = module.apply(
    variables, inputs, mutable=['intermediates', 'penalties']
  )
  (memberships,) = sown['intermediates']['memberships']
  if not weight:
    assert 'penalties' not in sown
    return
  expected = jnp.mean(membership_penalty(memberships, weight=weight))
  np.testing.assert_allclose(
    sown['penalties']['membership'][0], expected, rtol=1e-6
  )


@pytest.mark.parametrize('budget', BUDGETS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_the_gradient_reaches_every_parameter(rng, variant, budget):
  inputs = jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32)
  module = make(variant, 8, (2, 3), budget=budget, charts=2)
  variables = jax.jit(module.init)(jax.random.key(0), inputs)

  @jax.jit
  @jax.grad
  def gradient(variables):
    return jnp.sum(jnp.sin(module.apply(variables, inputs)))

  for path, leaf in jax.tree.leaves_with_path(gradient(variables)):
    assert np.all(np.asarray(leaf) != 0), path


def test_the_gain_makes_up_for_the_activation(rng):
  normal = jnp.asarray(rng.normal(size=100_000), jnp.float32)
  for activation in (jax.nn.gelu, jax.nn.relu, jnp.tanh):
    gain = activation_gain(activation)
    np.testing.assert_allclose(gain * np.std(activation(normal)), 1, rtol=0.01)
  np.testing.assert_allclose(activation_gain(None), 1, rtol=1e-6)


@pytest.mark.usefixtures('unchecked')
def test_errors_name_the_field():
  inputs, key = jnp.zeros((1, 6, 8)), jax.random.key(0)
  for module, message in [
    (ManifoldKeys(8, budget='half'), r"self.budget='half' must be one of"),
    (ManifoldKeys(8, charts=0), r'self.charts=0 positive'),
    (ManifoldKeys(8, charts=3), r'self.charts=3 must divide'),
    (ManifoldKeys(8, 'simple', 5), r'self.charts=5 are too many'),
    (ManifoldKeys(8, 'other', 2), r"variant='other' must be one of"),
    (ManifoldKeys(8, 'spatial', 2), 'needs a grid'),
  ]:
    with pytest.raises(ValueError, match=message):
      module.init(key, inputs)
