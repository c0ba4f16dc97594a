"""Tests of `msba_jax.models.cfi`."""

import jax
import jax.numpy as jnp
import numpy as np

from msba_jax.models.cfi import CrossLevelIntegration
from tests.layers.causal_test import gelu, softmax


def test_levels_at_which_others_depend_count_more(rng):
  """CFI with a graph, against NumPy; without trust the graph is not read."""
  module = CrossLevelIntegration()
  regions = rng.normal(size=(3, 4, 2, 5))
  dependents = 3 * rng.random((3, 4))
  arrays = [jnp.asarray(x, jnp.float32) for x in (regions, dependents)]
  params = jax.jit(module.init)(
    jax.random.key(0), arrays[0], dependents=arrays[1]
  )['params']
  leaves, tree = jax.tree.flatten(params)
  leaves = [x + 0.5 * rng.normal(size=x.shape).astype('f4') for x in leaves]
  params = jax.tree.unflatten(tree, leaves)
  apply = jax.jit(
    lambda params, *given: module.apply(
      {'params': params}, given[0], dependents=[*given, None][1]
    )
  )
  found, aux = apply(params, *arrays)

  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  logits = p['level_logits'] + np.log1p(dependents.T) * p['level_trust']
  levels = softmax(logits).T
  pairs = softmax(p['pair_logits'])
  inner, outer = p['pair']['inner'], p['pair']['outer']
  joined = np.concatenate([regions[:-1], regions[1:]], axis=-1)
  mixed = gelu(joined @ inner['kernel'] + inner['bias'])
  mixed = (mixed @ outer['kernel'] + outer['bias']).mean(axis=2)
  expected = np.einsum('ln,lnd->nd', levels, regions.mean(axis=2))
  expected += np.einsum('l,lnd->nd', pairs, mixed)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  np.testing.assert_allclose(aux['levels'], levels, atol=1e-6)
  assert np.ptp(levels, axis=1).min() > 1e-3

  plain, _ = apply(params, arrays[0])
  assert np.abs(plain - found).max() > 1e-3
  blind = params | {'level_trust': jnp.zeros(3)}
  np.testing.assert_allclose(apply(blind, *arrays)[0], plain, atol=1e-6)
