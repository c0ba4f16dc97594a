"""The content graph against NumPy, and how it enters a context."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.layers.attention import attention_weights
from msba_jax.models.context import Context, MemoryBank, batch, solo
from msba_jax.models.graph import ContentGraph, add_bias
from tests.models.conftest import initialised


@pytest.fixture
def solos(rng):
  """Unit vectors of six images."""
  vectors = rng.normal(size=(6, 5))
  return jnp.asarray(vectors / np.linalg.norm(vectors, axis=1)[:, None], 'f4')


def embed(regions):
  """The first region of the first level."""
  return regions[0, :, 0]


def weigh(context, solos, scale=4.0):
  """A context with a graph of this scale."""
  module = ContentGraph(scale=scale)
  apply = functools.partial(module.apply, levels=2, embed=embed)
  parameters = module.init(
    jax.random.key(0), context, solos, levels=2, embed=embed
  )
  return apply(parameters, context, solos)


def test_the_bias_is_the_scaled_cosine(solos):
  weighed, aux = weigh(batch(jnp.ones(6, bool)), solos, scale=7.0)
  vectors = np.asarray(solos, np.float64)
  off = ~np.eye(6, dtype=bool)
  np.testing.assert_allclose(
    weighed.bias[off], (7 * vectors @ vectors.T)[off], atol=1e-5
  )
  np.testing.assert_allclose(aux['scale'], 7, rtol=1e-5)


def test_biases_of_all_levels_and_of_each_add():
  rng = np.random.default_rng(0)
  every, each = rng.normal(size=(3, 4)), rng.normal(size=(2, 3, 4))
  for one, other in ((every, each), (each, every)):
    found = add_bias(jnp.asarray(one), jnp.asarray(other))
    np.testing.assert_allclose(found, each + every, atol=1e-6)


def test_solo_stays_solo(solos):
  assert weigh(solo, solos)[0] == solo


def test_foreign_images_are_weighed_by_their_embeddings(solos):
  regions = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3, 5)))
  context = Context(regions, jnp.ones(4, bool))
  weighed, _ = weigh(context, solos)
  np.testing.assert_allclose(
    weighed.bias, 4 * solos @ regions[0, :, 0].T, atol=1e-5
  )
  again, _ = weigh(weighed, solos)
  np.testing.assert_allclose(again.bias, 2 * weighed.bias, atol=1e-5)
  memory = MemoryBank(regions, jnp.ones(4, bool))
  beside, _ = weigh(batch(jnp.ones(6, bool), memory=memory), solos)
  np.testing.assert_array_equal(beside.memory.bias, weighed.bias)
  assert beside.bias.shape == (6, 6)


def test_an_image_looks_at_itself_only_when_nobody_else_is_there(solos):
  nothing = jnp.zeros((6, 1, 2))
  weighed, _ = weigh(batch(jnp.ones(6, bool)), solos)
  weights = attention_weights(nothing, nothing, bias=weighed.bias)[0]
  np.testing.assert_array_equal(jnp.diag(weights), 0)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
  alone = jnp.arange(6) == 2
  weights = attention_weights(
    nothing, nothing, bias=weighed.bias, mask=alone[None]
  )[0]
  np.testing.assert_array_equal(weights[2], alone)


def test_a_similar_image_is_read_more_before_any_training(images):
  """The second image is nearly the first; the graph finds it."""
  model, params = initialised('msba')
  images = images.at[1].set(images[0] + 0.01)
  apply = jax.jit(functools.partial(model.apply, {'params': params}))
  _, out = apply(images, context=batch(jnp.ones(8, bool)))
  attention = np.asarray(out['attention']).mean((0, 1, 2))
  assert attention[0].argmax() == 1
  assert attention[0, 1] > 1.5 / 7
