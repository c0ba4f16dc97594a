"""Tests of `msba_jax.losses.pairwise`; the rest is in `properties_test`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.losses import pairwise

LABELS = jnp.array([0, 0, 1, 2, 2])


@pytest.fixture
def embeddings(rng):
  return jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)


@pytest.mark.parametrize(
  'loss',
  [
    pairwise.multi_similarity,
    functools.partial(pairwise.batch_hard_triplet, margin=None),
  ],
)
def test_an_anchor_without_a_positive_counts_zero(embeddings, loss):
  losses = np.asarray(loss(embeddings, LABELS))
  assert np.flatnonzero(losses == 0).tolist() == [2]


def test_a_triplet_needs_a_negative(embeddings):
  losses = pairwise.batch_hard_triplet(embeddings, jnp.zeros(5, int))
  assert not np.any(np.asarray(losses))


def test_triplets_of_equal_embeddings_cost_the_margin(variant):
  def total(x):
    losses = pairwise.batch_hard_triplet(x, LABELS, margin=0.3)
    return losses.sum(), losses

  gradient, losses = variant(jax.grad(total, has_aux=True))(jnp.ones((5, 3)))
  np.testing.assert_allclose(losses, [0.3, 0.3, 0, 0.3, 0.3], rtol=1e-6)
  assert not np.any(np.asarray(gradient))


def test_small_distances_stay_exact():
  near = 1e-5
  embeddings = jnp.array([[1, 0], [1, near], [1, 3 * near]], jnp.float32)
  losses = pairwise.batch_hard_triplet(
    embeddings, jnp.array([0, 0, 1]), margin=0.01
  )
  np.testing.assert_allclose(
    losses, [0.01 + near - 3 * near, 0.01 + near - 2 * near, 0], rtol=1e-5
  )


def test_images_meet_their_texts(rng):
  images, texts = (
    jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (2, 3)
  )
  losses = pairwise.pairwise_sigmoid(
    images,
    jnp.array([5, 6]),
    others=texts,
    other_labels=jnp.array([6, 5, 7]),
    valid=jnp.array([True, True]),
    others_valid=jnp.array([True, True, False]),
    scale=jnp.float32(3.0),
    bias=jnp.float32(-1.0),
  )
  cosines = (images / jnp.linalg.norm(images, axis=1, keepdims=True)) @ (
    texts / jnp.linalg.norm(texts, axis=1, keepdims=True)
  ).T
  signs = np.array([[-1, 1, 0], [1, -1, 0]])
  expected = -jax.nn.log_sigmoid(signs * (3 * cosines - 1)) * signs**2
  np.testing.assert_allclose(losses, expected, atol=1e-6)


def test_scale_and_bias_may_be_learned(embeddings):
  def total(scale, bias):
    losses = pairwise.pairwise_sigmoid(
      embeddings, LABELS, scale=scale, bias=bias
    )
    return losses.sum()

  gradients = jax.jit(jax.grad(total, (0, 1)))(10.0, -10.0)
  assert all(np.isfinite(g) and g != 0 for g in gradients)


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize(
  'loss',
  [
    pairwise.multi_similarity,
    pairwise.batch_hard_triplet,
    pairwise.pairwise_sigmoid,
  ],
)
def test_wrong_shapes_are_named(embeddings, loss):
  with pytest.raises(ValueError, match=r'one per embedding.*\(4,\).*\(5, 3\)'):
    loss(embeddings, LABELS[:4])
  with pytest.raises(ValueError, match=r'valid must be one per image.*\(3,\)'):
    loss(embeddings, LABELS, valid=jnp.ones(3, bool))


@pytest.mark.usefixtures('unchecked')
def test_misuse_is_named(embeddings):
  with pytest.raises(ValueError, match=r'alpha=0'):
    pairwise.multi_similarity(embeddings, LABELS, alpha=0)
  with pytest.raises(ValueError, match=r'beta=-1'):
    pairwise.multi_similarity(embeddings, LABELS, beta=-1)
  with pytest.raises(ValueError, match=r'scale=0'):
    pairwise.pairwise_sigmoid(embeddings, LABELS, scale=0)
  with pytest.raises(ValueError, match=r'given together'):
    pairwise.pairwise_sigmoid(embeddings, LABELS, others=embeddings)
  with pytest.raises(ValueError, match=r'together with others'):
    pairwise.pairwise_sigmoid(
      embeddings, LABELS, others_valid=jnp.ones(5, bool)
    )
  with pytest.raises(ValueError, match=r'features: \(5, 3\) and \(5, 2\)'):
    pairwise.pairwise_sigmoid(
      embeddings, LABELS, others=embeddings[:, :2], other_labels=LABELS
    )
