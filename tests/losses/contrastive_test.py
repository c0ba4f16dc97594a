"""Tests of `msba_jax.losses.contrastive`; the rest is in `properties_test`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.losses import contrastive

LABELS = jnp.array([0, 0, 1, 2, 2])


@pytest.fixture
def embeddings(rng):
  return jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)


def test_an_anchor_without_a_positive_counts_zero(embeddings):
  losses = np.asarray(contrastive.supervised_contrastive(embeddings, LABELS))
  assert losses[2] == 0
  assert np.all(losses[[0, 1, 3, 4]] > 0)
  pairs = np.asarray(contrastive.nt_xent(embeddings, LABELS))
  assert set(zip(*np.nonzero(pairs), strict=True)) == {
    (0, 1), (1, 0), (3, 4), (4, 3)
  }  # fmt: skip


def test_one_class_pulls_its_cosines_together(embeddings):
  losses = contrastive.supervised_contrastive(embeddings, jnp.zeros(5, int))
  assert np.all(np.asarray(losses) >= np.log(4) - 1e-6)
  equal = contrastive.supervised_contrastive(jnp.eye(5), jnp.zeros(5, int))
  np.testing.assert_allclose(equal, np.log(4), rtol=1e-6)


def test_nt_xent_of_one_class_has_nothing_to_tell_apart(embeddings):
  losses = contrastive.nt_xent(embeddings, jnp.zeros(5, int))
  assert not np.any(np.asarray(losses))


def test_two_views_make_both_losses_equal(rng):
  views = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
  labels = jnp.arange(8) // 2
  np.testing.assert_allclose(
    contrastive.nt_xent(views, labels).sum(1),
    contrastive.supervised_contrastive(views, labels),
    rtol=1e-5,
  )


@pytest.mark.parametrize(
  'loss', [contrastive.supervised_contrastive, contrastive.nt_xent]
)
def test_the_temperature_may_be_learned(embeddings, loss):
  def total(temperature):
    return loss(embeddings, LABELS, temperature=temperature).sum()

  point, step = jnp.float32(0.5), 1e-2
  slope = (total(point + step) - total(point - step)) / (2 * step)
  np.testing.assert_allclose(jax.jit(jax.grad(total))(point), slope, rtol=1e-2)


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize(
  'loss', [contrastive.supervised_contrastive, contrastive.nt_xent]
)
def test_misuse_is_named(embeddings, loss):
  with pytest.raises(ValueError, match=r'temperature=0\b'):
    loss(embeddings, LABELS, temperature=0)
  with pytest.raises(ValueError, match=r'one per embedding.*\(4,\).*\(5, 3\)'):
    loss(embeddings, LABELS[:4])
  with pytest.raises(TypeError, match=r'integers.*float32'):
    loss(embeddings, LABELS * 1.0)
  with pytest.raises(ValueError, match=r'valid must be one per image.*\(3,\)'):
    loss(embeddings, LABELS, valid=jnp.ones(3, bool))
  with pytest.raises(TypeError, match=r'valid must be Boolean.*int32'):
    loss(embeddings, LABELS, valid=jnp.ones(5, jnp.int32))
