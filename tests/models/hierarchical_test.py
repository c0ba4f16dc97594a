"""Tests of `msba_jax.models.hierarchical`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from msba_jax.models.cfi import CrossLevelIntegration
from msba_jax.models.context import batch
from msba_jax.models.hierarchical import HierarchicalFusion
from tests.layers.causal_test import gelu, softmax
from tests.models.conftest import make_model

MODULE = HierarchicalFusion()


def initial(regions):
  return jax.jit(MODULE.init)(jax.random.key(0), regions)['params']


def perturbed(params):
  """Parameters none of which is a special value."""
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  leaves = [x + 0.5 * rng.normal(size=x.shape).astype('f4') for x in leaves]
  return jax.tree.unflatten(tree, leaves)


def array(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def standardized(x):
  x = x - x.mean(axis=-1, keepdims=True)
  return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)


def reference(params, regions):
  """The equations in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  y = np.asarray(regions, np.float64)
  held = standardized(y).mean(axis=2)
  shares = {'level': np.ones((1, y.shape[1]))}
  fused = y[0]
  if len(y) > 1:
    shares['pair'] = np.ones((1, y.shape[1]))
    told = {'level': held, 'pair': np.concatenate([held[:-1], held[1:]], -1)}
    for name in told.keys() if len(y) > 2 else ['level']:
      logits = np.einsum('lne,le->nl', told[name], p[f'{name}_seeks'])
      shares[name] = softmax(p[f'{name}_logits'] + logits).T
    fused = np.einsum('ln,lnrd->nrd', shares['level'], y)
    inner, outer = p['pair']['inner'], p['pair']['outer']
    joined = np.concatenate([y[:-1], y[1:]], axis=-1)
    mixed = gelu(joined @ inner['kernel'] + inner['bias'])
    mixed = mixed @ outer['kernel'] + outer['bias']
    fused = fused + np.einsum('ln,lnrd->nrd', shares['pair'], mixed)
  scores = standardized(fused) @ p['region_seeks'] / np.sqrt(y.shape[-1])
  shares['region'] = softmax(scores)
  return np.einsum('nr,nrd->nd', shares['region'], fused), shares


@pytest.mark.parametrize('levels', [1, 2, 3])
def test_the_stage_equals_its_equations(rng, levels):
  regions = array(rng, levels, 4, 3, 5)
  params = perturbed(initial(regions))
  apply = jax.jit(MODULE.apply)
  found, aux = apply({'params': params}, regions)
  expected, shares = reference(params, regions)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert found.dtype == jnp.float32
  assert set(aux) == {f'{name}s' for name in shares}
  for name, share in shares.items():
    np.testing.assert_allclose(aux[f'{name}s'], share, atol=1e-6)
  # Images decide for themselves: one alone finds what it finds among others.
  alone, _ = apply({'params': params}, regions[:, 2:3])
  np.testing.assert_allclose(alone, found[2:3], atol=1e-6)
  assert np.ptp(aux['regions'], axis=0).min() > 1e-3
  if levels > 1:
    assert np.ptp(aux['levels'], axis=1).min() > 1e-3


@pytest.mark.parametrize('levels', [1, 2, 3])
def test_it_begins_as_cross_level_integration(rng, levels):
  """With the parameters that both have, whatever these are."""
  regions = array(rng, levels, 4, 3, 5)
  plain = CrossLevelIntegration()
  others = perturbed(jax.jit(plain.init)(jax.random.key(1), regions)['params'])
  params = initial(regions)
  shared = params.keys() & others.keys()
  assert shared == others.keys() - ({'level_logits'} if levels == 1 else set())
  for name in params.keys() - shared:
    assert name.endswith('_seeks')
  params |= {name: others[name] for name in shared}
  found, aux = jax.jit(MODULE.apply)({'params': params}, regions)
  expected, plain_aux = jax.jit(plain.apply)({'params': others}, regions)
  np.testing.assert_allclose(found, expected, atol=2e-6)
  np.testing.assert_allclose(
    aux['levels'],
    np.broadcast_to(plain_aux['levels'][:, None], (levels, 4)),
    atol=1e-6,
  )
  np.testing.assert_allclose(aux['regions'], 1 / 3, atol=1e-6)


@pytest.mark.parametrize('levels', [1, 2, 3])
def test_everything_has_a_gradient(rng, levels):
  regions = array(rng, levels, 4, 3, 5)

  @jax.jit
  @jax.grad
  def gradient(given):
    params, regions = given
    return jnp.sum(jnp.sin(3 * MODULE.apply({'params': params}, regions)[0]))

  # From the first step on, where `seeks` are zero.
  for params in (initial(regions), perturbed(initial(regions))):
    found = gradient((params, regions))
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
      assert np.abs(np.asarray(leaf)).max() > 1e-5, jax.tree_util.keystr(path)


def test_the_gradient_is_that_of_finite_differences(rng):
  regions = array(rng, 2, 2, 3, 4)
  params = perturbed(initial(regions))
  check_grads(
    jax.jit(lambda *given: MODULE.apply({'params': given[0]}, given[1])[0]),
    (params, regions), order=1, modes=['rev'], atol=2e-2, rtol=2e-2, eps=1e-2,
  )  # fmt: skip


def test_msba_takes_it(rng):
  """An MSBA begins the same with it, in a context and without."""
  regions = array(rng, 2, 3, 4, 8)
  plain = make_model('msba')
  model = plain.clone(cfi=MODULE)
  made, params = (
    jax.jit(functools.partial(x.init, method='refine'))(
      jax.random.key(0), regions
    )['params']
    for x in (model, plain)
  )
  params = perturbed(params)
  both = params | {'cfi': made['cfi'] | params['cfi']}
  context = batch(jnp.ones(3, bool))
  (_, expected), (_, found) = (
    jax.jit(functools.partial(x.apply, method='refine'))(
      {'params': given}, regions, context=context
    )
    for x, given in ((plain, params), (model, both))
  )
  for name in ('solo', 'context'):
    np.testing.assert_allclose(found[name], expected[name], atol=5e-6)
  assert found['aux']['cfi']['regions'].shape == (3, 4)
