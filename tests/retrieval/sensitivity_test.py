"""Tests of `msba_jax.retrieval.sensitivity`."""

import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.data.errors import InputError
from msba_jax.models.context import batch
from msba_jax.retrieval.sensitivity import batch_sensitivity


def test_sensitivity_is_the_mean_distance_over_divisions(embedder, pictures):
  measured = batch_sensitivity(
    embedder, pictures, batches=3, batch_size=8, images=16, progress=False
  )
  # The same numbers from whole images, with the same draws.
  rng = np.random.default_rng(0)
  sample = rng.choice(50, 16, replace=False)
  images = pictures.images[sample] / 255 - embedder.mean
  images = images / np.asarray(embedder.std)
  embedded = []
  for _ in range(3):
    order = rng.permutation(16)
    vectors = np.zeros((16, 5))
    for rows in order.reshape(2, 8):
      vectors[rows] = embedder.model.apply(
        {'params': embedder.params},
        jnp.asarray(images[rows], jnp.float32),
        context=batch(jnp.ones(8, bool)),
      )[0]
    embedded.append(vectors)
  expected = np.mean(
    [
      np.linalg.norm(embedded[i] - embedded[j], axis=1).mean()
      for i, j in [(0, 1), (0, 2), (1, 2)]
    ]
  )
  assert measured == pytest.approx(expected, rel=2e-2)
  assert measured > 1e-3


def test_a_model_that_ignores_its_batch_is_not_sensitive(
  make_embedder, pictures
):
  alone = make_embedder(contextual=False)
  assert batch_sensitivity(alone, pictures, batches=2, progress=False) < 1e-6


def test_sensitivity_of_a_small_source(embedder, make_pictures):
  few = batch_sensitivity(embedder, make_pictures(5), progress=False)
  assert 0 < few < 2
  with pytest.raises(InputError, match='3 images are too few'):
    batch_sensitivity(embedder, make_pictures(3))
  with pytest.raises(ValueError, match='batches=1'):
    batch_sensitivity(embedder, make_pictures(5), batches=1)
