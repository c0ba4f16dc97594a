"""Tests of `msba_jax.losses.causal` against float64 NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax import losses
from msba_jax.losses import causal
from tests.losses.conftest import cross_entropy, unit

NAMES = ('effect', 'acyclicity', 'sparsity')


@pytest.fixture
def out(rng):
  sizes = {'solo': 6, 'context': 6, 'counterfactual': 6, 'proxies': 3}
  vectors = {
    key: jnp.asarray(rng.normal(size=(size, 4)), jnp.float32)
    for key, size in sizes.items()
  }
  graph = {'acyclicity': jnp.array(0.3), 'edges': jnp.array(0.7)}
  return vectors | {'aux': {'graph': graph}}


@pytest.fixture
def batch():
  return {
    'label': jnp.array([0, 0, 1, 1, 2, 2], jnp.int32),
    'valid': jnp.array([True] * 5 + [False]),
  }


def effect(out, batch, **options):
  return causal.counterfactual_effect(
    out['context'],
    out['counterfactual'],
    batch['label'],
    out['proxies'],
    valid=batch['valid'],
    **options,
  )


def reference(out, batch, temperature):
  x, y, w = (
    np.asarray(out[key], np.float64)
    for key in ('context', 'counterfactual', 'proxies')
  )
  logits = (unit(x) - unit(y)) @ unit(w).T / temperature
  labels, valid = np.asarray(batch['label']), np.asarray(batch['valid'])
  return cross_entropy(logits, labels, w, valid, smoothing=0)


@pytest.mark.parametrize('temperature', [0.05, 1.0])
def test_the_effect_equals_the_reference(out, batch, variant, temperature):
  found = variant(lambda o, b: effect(o, b, temperature=temperature))(
    out, batch
  )
  expected = reference(out, batch, temperature)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  assert found.shape == (6,)
  assert found[5] == 0
  assert expected[:5].min() >= 0
  assert expected[0] > 1


def test_its_temperature_is_that_of_the_other_softmax(out, batch):
  np.testing.assert_allclose(
    effect(out, batch), reference(out, batch, 0.05), rtol=1e-4, atol=1e-5
  )


def test_what_says_nothing_costs_log_c(out, batch):
  """And what both have in common has no gradient."""

  def total(common):
    both = {'context': common, 'counterfactual': common}
    found = effect(out | both, batch)
    return jnp.sum(found), found

  (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
    out['context']
  )
  np.testing.assert_allclose(found[:5], np.log(3), rtol=1e-6)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)
  apart = jax.grad(
    lambda x: jnp.sum(
      effect(out | {'context': x, 'counterfactual': out['context']}, batch)
    )
  )(out['context'])
  assert np.all(np.abs(apart[:5]).max(axis=1) > 1e-2)


@pytest.mark.parametrize('value', [7.0, jnp.inf, jnp.nan])
def test_padding_has_no_influence(out, batch, value):
  streams = ('context', 'counterfactual')

  @jax.jit
  @jax.value_and_grad
  def total(given):
    return jnp.sum(effect(out | given, batch))

  expected = total({key: out[key] for key in streams})
  found = total({key: out[key].at[5].set(value) for key in streams})
  chex.assert_trees_all_close(found, expected, rtol=1e-6)
  for gradient in found[1].values():
    np.testing.assert_array_equal(gradient[5], 0)
    assert np.all(np.abs(gradient[:5]).max(axis=1) > 0)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_effect_is_float32(out, batch, dtype):
  out = {key: out[key].astype(dtype) for key in out if key != 'aux'}
  chex.assert_type(effect(out, batch), jnp.float32)


def test_misuse_of_the_effect_is_named(out, batch):
  with pytest.raises(ValueError, match='temperature=0'):
    effect(out, batch, temperature=0)


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize('key', ['context', 'counterfactual'])
def test_a_stream_of_another_size_is_named(out, batch, key):
  with pytest.raises(ValueError, match='labels'):
    effect(out | {key: out[key][:4]}, batch)


def test_the_objective_is_that_of_msba_and_three_terms(out, batch):
  loss = losses.supervised_contrastive
  options = {'consistency': 0.3, 'classification_weight': 0.5}
  terms = losses.castle_losses(loss, **options)
  base = losses.msba_losses(loss, **options)
  assert [(t.name, t.weight) for t in terms] == [
    *((t.name, t.weight) for t in base),
    ('effect', 1.0),
    ('acyclicity', 0.01),
    ('sparsity', 1e-4),
  ]
  total, values = losses.total_loss(terms, out, batch)
  mean = reference(out, batch, 0.05)[:5].mean()
  expected = {'effect': mean, 'acyclicity': 0.3, 'sparsity': 0.7}
  for name, value in expected.items():
    np.testing.assert_allclose(values[name], value, rtol=1e-4)
  np.testing.assert_allclose(
    total,
    losses.total_loss(base, out, batch)[0] + mean + 0.01 * 0.3 + 1e-4 * 0.7,
    rtol=1e-5,
  )


@pytest.mark.parametrize('name', NAMES)
def test_a_term_of_weight_zero_is_left_out(out, batch, name):
  terms = losses.castle_losses(losses.proxy_anchor, **{name: 0.0})
  names = [term.name for term in terms]
  assert [x for x in names if x in NAMES] == [x for x in NAMES if x != name]
  # What it would read need not be there.
  out = dict(out)
  if name == 'effect':
    del out['counterfactual']
  else:
    told = {'acyclicity': 'acyclicity', 'sparsity': 'edges'}[name]
    graph = {k: v for k, v in out['aux']['graph'].items() if k != told}
    out['aux'] = {'graph': graph}
  assert np.isfinite(losses.total_loss(terms, out, batch)[0])


def test_other_weights_are_taken(out, batch):
  weights = {'effect': 0.2, 'acyclicity': 3.0, 'sparsity': 5.0}
  terms = losses.castle_losses(losses.proxy_anchor, **weights)
  assert {t.name: t.weight for t in terms if t.name in NAMES} == weights
  assert np.isfinite(losses.total_loss(terms, out, batch)[0])


@pytest.mark.parametrize('name', NAMES)
def test_a_negative_weight_is_named(name):
  with pytest.raises(ValueError, match=f'{name}=-1'):
    losses.castle_losses(losses.proxy_anchor, **{name: -1.0})


@pytest.mark.parametrize('missing', ['absent', 'none'])
@pytest.mark.parametrize('key', ['counterfactual', 'proxies'])
def test_what_the_effect_lacks_is_named(out, batch, key, missing):
  terms = losses.castle_losses(losses.supervised_contrastive)
  out = {k: v for k, v in out.items() if k != key}
  if missing == 'none':
    out[key] = None
  with pytest.raises(ValueError, match=rf"effect loss needs out\['{key}'\]"):
    losses.total_loss(terms, out, batch)


@pytest.mark.parametrize('key', ['acyclicity', 'edges'])
def test_what_the_graph_does_not_tell_is_named(out, batch, key):
  graph = {k: v for k, v in out['aux']['graph'].items() if k != key}
  with pytest.raises(ValueError, match=f'tells no {key} of its graph'):
    losses.total_loss(
      losses.castle_losses(losses.proxy_anchor),
      out | {'aux': {'graph': graph}},
      batch,
    )
