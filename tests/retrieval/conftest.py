"""A tiny model with the interface of `MSBA`, and a source of random images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.data.source import Record
from msba_jax.models.context import Solo, solo
from msba_jax.retrieval.devices import local_mesh
from msba_jax.retrieval.embed import Embedder


class Pictures:
  """Random images of eight classes; `broken` cannot be decoded."""

  def __init__(self, number=50, *, seed=0, classes=8, broken=None):
    rng = np.random.default_rng(seed)
    self.images = rng.integers(0, 256, (number, 8, 8, 3), np.uint8)
    self.labels = rng.integers(0, classes, number).astype(np.int32)
    self.class_names = tuple(f'class {i}' for i in range(classes))
    self.ids = tuple(f'picture {i}' for i in range(number))
    self.broken = broken

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    if index == self.broken:
      raise OSError(f'{self.ids[index]} cannot be decoded')
    return Record(image=self.images[index], label=int(self.labels[index]))


class Attentive(nn.Module):
  """Two levels of four regions; a context shifts them by what is alike."""

  features: int = 6
  contextual: bool = True

  def setup(self):
    self.levels = [nn.Dense(self.features, name=f'level{i}') for i in (0, 1)]
    self.head = nn.Dense(5)

  def encode(self, images):
    n, height, width, channels = images.shape
    halves = (n, 2, height // 2, 2, width // 2, channels)
    tokens = jnp.moveaxis(images.reshape(halves), 3, 2).reshape(n, 4, -1)
    return jnp.stack([level(tokens) for level in self.levels])

  def refine(self, regions, *, context=solo):
    shifted = regions
    if self.contextual and not isinstance(context, Solo):
      keys = getattr(context, 'regions', regions)
      scores = jnp.einsum('lnrd,lmrd->lrnm', regions, keys)
      scores = jnp.where(context.valid[None, None, None], scores, -1e9)
      weights = nn.softmax(scores) * jnp.any(context.valid)
      shifted += jnp.einsum('lrnm,lmrd->lnrd', weights, keys)
    out = {'solo': self.embed(regions), 'context': self.embed(shifted)}
    out['regions'] = regions
    return out['context'], out

  def embed(self, regions):
    vectors = self.head(jnp.tanh(regions).mean((0, 2)))
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)

  def __call__(self, images, *, context=solo, train=False):
    del train
    return self.refine(self.encode(images), context=context)


@pytest.fixture(scope='session')
def make_pictures():
  return Pictures


@pytest.fixture(scope='session')
def pictures():
  return Pictures()


@pytest.fixture(scope='session')
def make_embedder():
  def make(seed=0, **fields):
    model = Attentive(**fields)
    images = jnp.zeros((1, 8, 8, 3))
    params = model.init(jax.random.key(seed), images)['params']
    return Embedder(model, params, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2))

  return make


@pytest.fixture(scope='session')
def embedder(make_embedder):
  return make_embedder()


@pytest.fixture(scope='session')
def meshes():
  """Meshes over 1, 2, 4 and 8 devices."""
  return {n: local_mesh(jax.devices()[:n]) for n in (1, 2, 4, 8)}
