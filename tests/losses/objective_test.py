"""Tests of `msba_jax.losses.objective`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax import losses

METRIC_LOSSES = [
  losses.supervised_contrastive,
  losses.nt_xent,
  losses.multi_similarity,
  losses.batch_hard_triplet,
  losses.pairwise_sigmoid,
  losses.proxy_anchor,
  losses.arcface,
  losses.normalized_softmax,
]


@pytest.fixture
def out(rng):
  return {
    key: jnp.asarray(rng.normal(size=(size, 4)), jnp.float32)
    for key, size in (('solo', 6), ('context', 6), ('proxies', 3))
  }


@pytest.fixture
def batch():
  return {
    'label': jnp.array([0, 0, 1, 1, 2, 2], jnp.int32),
    'valid': jnp.array([True] * 5 + [False]),
  }


def test_is_the_equation_of_msba(out, batch):
  labels, valid = batch['label'], batch['valid']
  loss = functools.partial(losses.supervised_contrastive, temperature=0.2)
  total, values = losses.total_loss(
    losses.msba_losses(loss, consistency=0.3), out, batch
  )
  # The fifth image lost its only positive to padding: four anchors remain.
  solo, context = (
    loss(out[key], labels, valid=valid)[:4].mean() for key in streams()
  )
  cosines = jnp.sum(out['solo'] * out['context'], 1) / (
    jnp.linalg.norm(out['solo'], axis=1)
    * jnp.linalg.norm(out['context'], axis=1)
  )
  apart = jnp.mean(1 - cosines[:5])
  np.testing.assert_allclose(
    total, (solo + context) / 2 + 0.3 * apart, rtol=1e-5
  )
  assert values.keys() == {'metric_solo', 'metric_context', 'consistency'}
  np.testing.assert_allclose(values['consistency'], apart, rtol=1e-5)


def streams():
  return ('solo', 'context')


def test_both_streams_share_a_classifier(out, batch):
  terms = losses.msba_losses(
    losses.multi_similarity, consistency=0.0, classification_weight=0.25
  )
  assert [(t.name, t.weight) for t in terms] == [
    ('metric_solo', 0.5), ('metric_context', 0.5), ('classification', 0.25)
  ]  # fmt: skip
  per_stream = [
    losses.normalized_softmax(
      out[key],
      batch['label'],
      out['proxies'],
      smoothing=0.1,
      valid=batch['valid'],
    )[:5].mean()
    for key in streams()
  ]
  np.testing.assert_allclose(
    terms[2].function(out, batch), np.mean(per_stream), rtol=1e-5
  )


@pytest.mark.parametrize('loss', METRIC_LOSSES)
def test_every_loss_trains_every_input(out, batch, loss):
  terms = losses.msba_losses(loss, classification_weight=0.5)

  @jax.jit
  @jax.grad
  def gradient(out):
    return losses.total_loss(terms, out, batch)[0]

  gradients = gradient(out)
  chex.assert_tree_all_finite(gradients)
  assert np.all(np.abs(np.asarray(gradients['proxies'])).sum(1) > 0)
  for key in streams():
    sizes = np.abs(np.asarray(gradients[key])).sum(1)
    assert np.all(sizes[:5] > 0)
    assert sizes[5] == 0


def test_a_batch_of_padding_costs_nothing(out, batch):
  terms = losses.msba_losses(
    losses.supervised_contrastive, classification_weight=1.0
  )
  batch = {**batch, 'valid': jnp.zeros(6, bool)}

  def objective(out):
    return losses.total_loss(terms, out, batch)[0]

  value, gradient = jax.jit(jax.value_and_grad(objective))(out)
  assert value == 0
  chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, out))


def test_the_control_sees_solo_alone(out, batch):
  terms = losses.solo_losses(losses.proxy_anchor, classification_weight=0.5)
  assert [(t.name, t.weight) for t in terms] == [
    ('metric_solo', 1.0), ('classification', 0.5)
  ]  # fmt: skip
  del out['context']
  total, values = losses.total_loss(terms, out, batch)
  expected = losses.proxy_anchor(
    out['solo'], batch['label'], out['proxies'], valid=batch['valid']
  ).mean()
  np.testing.assert_allclose(values['metric_solo'], expected, rtol=1e-6)
  np.testing.assert_allclose(
    total, expected + 0.5 * values['classification'], rtol=1e-6
  )


def test_msba_without_context_costs_what_the_control_costs(out, batch):
  out['context'] = out['solo']
  options = {'classification_weight': 0.5}
  with_context, _ = losses.total_loss(
    losses.msba_losses(losses.nt_xent, **options), out, batch
  )
  alone, _ = losses.total_loss(
    losses.solo_losses(losses.nt_xent, **options), out, batch
  )
  np.testing.assert_allclose(with_context, alone, rtol=1e-5)


def test_another_loss_and_another_reduction(out, batch):
  def squares(embeddings, labels, *, valid):
    del labels
    return jnp.where(valid, jnp.sum(embeddings**2, axis=-1), 0)

  def largest(values, labels, valid):
    del labels, valid
    return jnp.max(values)

  mean, peak = (
    losses.total_loss(losses.solo_losses(squares, reduce=r), out, batch)[0]
    for r in (None, largest)
  )
  expected = np.sum(np.asarray(out['solo'])[:5] ** 2, axis=1)
  np.testing.assert_allclose(mean, expected.mean(), rtol=1e-5)
  np.testing.assert_allclose(peak, expected.max(), rtol=1e-5)


def test_published_reductions():
  names = {
    loss.__name__: losses.published_reduction(loss).__name__
    for loss in METRIC_LOSSES
  }
  assert names == {
    'supervised_contrastive': 'mean_over_anchors',
    'nt_xent': 'mean_over_positive_pairs',
    'multi_similarity': 'mean_over_anchors',
    'batch_hard_triplet': 'mean_over_anchors',
    'pairwise_sigmoid': 'sum_over_pairs_per_image',
    'proxy_anchor': 'mean_over_proxies',
    'arcface': 'mean_over_images',
    'normalized_softmax': 'mean_over_images',
  }


def test_misuse_is_named(out, batch):
  with pytest.raises(ValueError, match='consistency=-1'):
    losses.msba_losses(losses.nt_xent, consistency=-1.0)
  with pytest.raises(ValueError, match=r'weight=-0\.5'):
    losses.solo_losses(losses.nt_xent, classification_weight=-0.5)
  for terms in (
    losses.msba_losses(functools.partial(losses.proxy_anchor, alpha=8.0)),
    losses.solo_losses(losses.nt_xent, classification_weight=1.0),
  ):
    with pytest.raises(ValueError, match=r"needs proxies, but out\['proxies"):
      losses.total_loss(terms, {**out, 'proxies': None}, batch)


def test_all_public_names_exist():
  assert sorted(losses.__all__) == losses.__all__
  for name in losses.__all__:
    assert hasattr(losses, name)
