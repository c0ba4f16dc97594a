"""Tests of `msba_jax.retrieval.embed` and of the fingerprint."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.data.errors import InputError
from msba_jax.models.context import Context
from msba_jax.retrieval.embed import ArraySource, embed, embed_batches
from msba_jax.retrieval.fingerprint import model_fingerprint


def direct(embedder, images, context=None):
  """The model applied to all images at once."""
  normal = (images / 255 - embedder.mean) / np.asarray(embedder.std)
  options = {} if context is None else {'context': context}
  embeddings, out = embedder.model.apply(
    {'params': embedder.params}, jnp.asarray(normal, jnp.float32), **options
  )
  return embeddings, out


@pytest.mark.parametrize('devices', [1, 2, 8])
def test_equals_the_model_on_any_number_of_devices(
  embedder, pictures, meshes, devices
):
  embedded = embed(
    embedder,
    pictures,
    batch_size=16,
    mesh=meshes[devices],
    keep_regions=True,
    progress=False,
  )
  vectors, out = direct(embedder, pictures.images)
  np.testing.assert_allclose(embedded.vectors, vectors, atol=1e-6)
  np.testing.assert_allclose(
    embedded.regions, np.moveaxis(out['regions'], 0, 1), atol=5e-3
  )
  assert embedded.vectors.dtype == np.float32
  assert embedded.regions.dtype == np.float16
  np.testing.assert_array_equal(embedded.labels, pictures.labels)
  assert embedded.ids == pictures.ids


def test_a_vector_does_not_depend_on_what_is_embedded_with_it(
  embedder, pictures, meshes
):
  options = {'mesh': meshes[1], 'progress': False}
  together = embed(embedder, pictures, batch_size=50, **options)
  for images in (pictures.images[7:8], pictures.images[5:20]):
    apart = embed(embedder, ArraySource(images), **options)
    start = 7 if len(images) == 1 else 5
    np.testing.assert_allclose(
      apart.vectors, together.vectors[start : start + len(images)], atol=1e-6
    )
    assert apart.regions is None


def test_a_memory_is_seen_by_every_image(embedder, pictures, meshes, rng):
  memory = Context(
    jnp.asarray(rng.normal(size=(2, 9, 4, 6)), jnp.float32),
    jnp.asarray(rng.random(9) < 0.7),
    None,
  )
  embedded = embed(
    embedder,
    pictures,
    batch_size=16,
    mesh=meshes[2],
    context=memory,
    progress=False,
  )
  expected, out = direct(embedder, pictures.images, memory)
  np.testing.assert_allclose(embedded.vectors, expected, atol=3e-6)
  assert np.abs(np.asarray(out['solo']) - embedded.vectors).max() > 0.01


def test_pieces_are_the_source_and_compile_once(
  make_embedder, pictures, meshes
):
  embedder = make_embedder()
  for _ in range(2):
    pieces = list(
      embed_batches(
        embedder, pictures, batch_size=16, mesh=meshes[1], progress=False
      )
    )
    assert [piece.start for piece in pieces] == [0, 16, 32, 48]
    np.testing.assert_array_equal(
      np.concatenate([piece.images for piece in pieces]), pictures.images
    )
  assert embedder.compiled._cache_size() == 1


def test_the_bar_says_speed_and_remaining_time(
  embedder, pictures, meshes, capsys
):
  embed(embedder, pictures, batch_size=16, mesh=meshes[1])
  shown = capsys.readouterr().err
  assert 'embed' in shown
  assert '50/50' in shown
  assert 'image/s' in shown


def test_what_cannot_be_embedded_is_named(
  embedder, pictures, make_pictures, meshes
):
  with pytest.raises(InputError, match='no image to embed'):
    embed(embedder, make_pictures(0), progress=False)
  with pytest.raises(ValueError, match='batch_size=0'):
    embed(embedder, pictures, batch_size=0, progress=False)
  broken = dataclasses.replace(
    embedder, params=jax.tree.map(lambda x: x * np.nan, embedder.params)
  )
  with pytest.raises(InputError, match='picture 0 is not finite'):
    embed(broken, pictures, mesh=meshes[1], progress=False)


def test_the_fingerprint_is_of_values_and_structure(embedder, make_embedder):
  assert embedder.fingerprint == make_embedder().fingerprint
  assert len(embedder.fingerprint) == 64
  others = [
    make_embedder(seed=1),
    make_embedder(contextual=False),
    dataclasses.replace(embedder, mean=(0.5, 0.4, 0.2)),
  ]
  prints = {embedder.fingerprint, *(other.fingerprint for other in others)}
  assert len(prints) == 4


def test_functions_count_by_name_arguments_and_closure(embedder):
  def scale(factor):
    return lambda x: factor * x

  facts = [
    jax.nn.gelu,
    jax.nn.relu,
    functools.partial(jax.nn.gelu, approximate=False),
    functools.partial(jax.nn.gelu, approximate=True),
    scale(1.0),
    scale(2.0),
    {'a': (1, [2, None])},
    {'a': (1, [3, None])},
    np.arange(3),
    np.arange(3) + 1,
    jnp.float32,
    jnp.bfloat16,
  ]
  prints = [model_fingerprint(embedder.model, {}, fact) for fact in facts]
  assert len(set(prints)) == len(facts)
  assert prints[4] == model_fingerprint(embedder.model, {}, scale(1.0))


def test_two_processes_agree_on_the_fingerprint():
  code = """
import functools, flax.linen as nn, jax, numpy as np
from msba_jax.retrieval.fingerprint import model_fingerprint
fact = functools.partial(jax.nn.gelu, approximate=False)
print(model_fingerprint(nn.Dense(3, kernel_init=nn.initializers.zeros), {'b':
  np.arange(3)}, fact, {'x', 'y'} and nn.LayerNorm()))
"""
  prints = {
    subprocess.run(
      [sys.executable, '-c', code],
      capture_output=True, text=True, check=True, timeout=100,
    ).stdout
    for _ in range(2)
  }  # fmt: skip
  assert len(prints) == 1
