"""Tests of `msba_jax.metrics.ranks`."""

import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.layers.nearest import exact_topk
from msba_jax.metrics.ranks import (
  ABSENT,
  padded_gallery,
  positive_ranks,
  query_block,
)


def test_ranks_are_places_in_exact_topk(rng):
  images = np.repeat(rng.normal(size=(20, 33)), 3, axis=0).astype(np.float32)
  found = exact_topk(jnp.asarray(images[:8]), jnp.asarray(images), 60)
  indices = np.array(found.indices)
  ranks = positive_ranks(
    images[:8],
    padded_gallery(images),
    indices[:, [40, 3, 17]],
    np.full((8, 1), -1),
    images=60,
  )
  np.testing.assert_array_equal(ranks, np.tile([4, 18, 41], (8, 1)))


def test_ignored_images_leave_the_ranking():
  gallery = np.array([[4.0], [3.0], [2.0], [1.0]], np.float32)
  ranks = positive_ranks(
    np.ones((1, 1), np.float32),
    padded_gallery(gallery),
    np.array([[3, 1, 2, -1]]),
    np.array([[0, 2, -1]]),
    images=4,
  )
  np.testing.assert_array_equal(ranks, [[1, 2, ABSENT, ABSENT]])


def test_the_batch_follows_the_gallery():
  assert query_block(60_000, 60_000) == 280
  assert query_block(60_000, 10) == 1024
  assert query_block(3, 10) == 8
  assert query_block(100, 10**9) == 8
  assert query_block(100, 10, block=17) == 24
  with pytest.raises(ValueError, match='block=0'):
    query_block(1, 1, block=0)
