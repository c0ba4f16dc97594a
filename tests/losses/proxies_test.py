"""Tests of `msba_jax.losses.proxies`; the rest is in `properties_test`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.losses import proxies

LOSSES = [proxies.proxy_anchor, proxies.arcface, proxies.normalized_softmax]


@pytest.fixture
def batch(rng):
  return (
    jnp.asarray(rng.normal(size=(5, 4)), jnp.float32),
    jnp.array([0, 0, 1, 2, 2]),
    jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
  )


def test_proxies_without_an_image_only_push(batch):
  embeddings, labels, vectors = batch
  losses = proxies.proxy_anchor(embeddings, labels, vectors, alpha=4.0)
  absent = jnp.full_like(labels, -1)
  pushes = proxies.proxy_anchor(embeddings, absent, vectors, alpha=4.0)
  np.testing.assert_allclose(losses[3:], pushes[3:], rtol=1e-6)
  assert np.all(np.asarray(losses != pushes)[:3])


def test_a_class_without_a_proxy_counts_zero(batch):
  embeddings, labels, vectors = batch
  for loss in (proxies.arcface, proxies.normalized_softmax):
    losses = loss(embeddings, labels.at[1].set(6).at[3].set(-1), vectors)
    assert np.flatnonzero(np.asarray(losses) == 0).tolist() == [1, 3]


def test_arcface_without_a_margin_is_a_softmax_of_cosines(batch):
  np.testing.assert_allclose(
    proxies.arcface(*batch, margin=0.0, scale=20.0),
    proxies.normalized_softmax(*batch, temperature=0.05),
    rtol=1e-5,
    atol=1e-6,
  )


def test_arcface_falls_as_the_angle_shrinks():
  angles = jnp.linspace(0, np.pi, 41)
  embeddings = jnp.stack(
    [jnp.cos(angles), jnp.sin(angles), jnp.zeros(41)], axis=1
  )
  labels = jnp.zeros(41, jnp.int32)
  own_and_rival = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
  for margin in (0.5, 1.5):
    losses = proxies.arcface(
      embeddings, labels, own_and_rival, scale=4.0, margin=margin
    )
    assert np.all(np.diff(losses) > 0)
  assert np.all(losses > proxies.normalized_softmax(
    embeddings, labels, own_and_rival, temperature=0.25
  ))  # fmt: skip


def test_arcface_on_its_proxy_has_a_finite_gradient():

  @jax.jit
  @jax.grad
  def gradient(x):
    return proxies.arcface(x, jnp.arange(3), jnp.eye(3)).sum()

  for sign in (1, -1):
    assert np.all(np.isfinite(gradient(sign * jnp.eye(3))))


@pytest.mark.parametrize('loss', LOSSES)
def test_the_length_of_vectors_does_not_matter(batch, loss):
  embeddings, labels, vectors = batch
  np.testing.assert_allclose(
    loss(3 * embeddings, labels, 0.2 * vectors), loss(*batch), rtol=1e-4
  )


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize('loss', LOSSES)
def test_wrong_shapes_are_named(batch, loss):
  embeddings, labels, vectors = batch
  with pytest.raises(ValueError, match=r'one per embedding.*\(4,\).*\(5, 4\)'):
    loss(embeddings, labels[:4], vectors)
  with pytest.raises(ValueError, match=r'features: \(5, 4\) and \(6, 3\)'):
    loss(embeddings, labels, vectors[:, :3])


@pytest.mark.usefixtures('unchecked')
def test_misuse_is_named(batch):
  with pytest.raises(ValueError, match='alpha=0'):
    proxies.proxy_anchor(*batch, alpha=0)
  with pytest.raises(ValueError, match='scale=-1'):
    proxies.arcface(*batch, scale=-1)
  with pytest.raises(
    ValueError, match=r'margin=28\.6 must lie between 0 and π'
  ):
    proxies.arcface(*batch, margin=28.6)
  with pytest.raises(ValueError, match='temperature=0'):
    proxies.normalized_softmax(*batch, temperature=0)
