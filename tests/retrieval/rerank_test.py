"""Tests of `msba_jax.retrieval.rerank`."""

import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.context import Context
from msba_jax.retrieval.embed import embed
from msba_jax.retrieval.rerank import (
  neighbour_refinement,
  refine_by_neighbours,
  rerank,
)
from msba_jax.retrieval.search import Neighbours, search


def unit(rng, *shape):
  drawn = rng.normal(size=shape).astype(np.float32)
  return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


@pytest.fixture
def collection(embedder, pictures, meshes):
  return embed(
    embedder, pictures, mesh=meshes[1], keep_regions=True, progress=False
  )


def one_by_one(embedder, regions, gallery_regions, near):
  """Each image refined alone, in a loop."""
  vectors = []
  for own, rows in zip(regions, near, strict=True):
    context = Context(
      jnp.moveaxis(jnp.asarray(gallery_regions[rows], jnp.float32), 0, 1),
      jnp.ones(len(rows), bool),
      None,
    )
    embeddings, _ = embedder.model.apply(
      {'params': embedder.params},
      jnp.asarray(own, jnp.float32)[:, None],
      context=context,
      method='refine',
    )
    vectors.append(embeddings[0])
  return np.stack(vectors)


@pytest.mark.parametrize('devices', [1, 4])
def test_every_image_has_a_context_of_its_own(
  embedder, collection, meshes, devices
):
  refined = refine_by_neighbours(
    embedder,
    collection.regions,
    collection.vectors,
    collection.regions,
    collection.vectors,
    k=5,
    exclude_self=True,
    batch_size=16,
    mesh=meshes[devices],
    progress=False,
  )
  near = search(
    collection.vectors, collection.vectors, 5, exclude_self=True,
    mesh=meshes[1],
  ).indices  # fmt: skip
  expected = one_by_one(embedder, collection.regions, collection.regions, near)
  np.testing.assert_allclose(refined, expected, atol=2e-6)
  assert np.abs(refined - collection.vectors).max() > 0.01


def test_alone_as_among_many(embedder, collection, meshes):
  options = {'k': 4, 'mesh': meshes[1], 'progress': False}
  stored = collection.regions[10:], collection.vectors[10:]
  many = refine_by_neighbours(
    embedder, collection.regions[:10], collection.vectors[:10], *stored,
    **options,
  )  # fmt: skip
  alone = refine_by_neighbours(
    embedder, collection.regions[3:4], collection.vectors[3:4], *stored,
    **options,
  )  # fmt: skip
  np.testing.assert_allclose(alone[0], many[3], atol=2e-6)


def test_a_small_gallery_fills_a_part_of_the_context(
  embedder, collection, meshes
):
  options = {'k': 20, 'mesh': meshes[1], 'progress': False}
  few = collection.regions[:3], collection.vectors[:3]
  refined = refine_by_neighbours(embedder, *few, *few, **options)
  expected = one_by_one(embedder, few[0], few[0], np.tile(np.arange(3), (3, 1)))
  np.testing.assert_allclose(refined, expected, atol=2e-6)
  # Nobody to look at: solo again, up to the float16 of the stored regions.
  one = collection.regions[:1], collection.vectors[:1]
  lonely = refine_by_neighbours(
    embedder, *one, *one, exclude_self=True, **options
  )
  np.testing.assert_allclose(lonely, one[1], atol=2e-3)


def test_a_model_without_context_gives_solo_back(
  make_embedder, collection, meshes
):
  refined = refine_by_neighbours(
    make_embedder(contextual=False),
    collection.regions, collection.vectors,
    collection.regions, collection.vectors,
    mesh=meshes[1], progress=False,
  )  # fmt: skip
  np.testing.assert_array_equal(refined, collection.vectors)


@pytest.mark.usefixtures('unchecked')
def test_regions_of_other_images_are_refused(embedder, collection):
  with pytest.raises(ValueError, match='gallery_regions and vectors must be'):
    refine_by_neighbours(
      embedder, collection.regions, collection.vectors,
      collection.regions[:5], collection.vectors,
    )  # fmt: skip


def test_rerank_orders_the_head_and_keeps_the_rest(rng):
  gallery = unit(rng, 12, 4)
  queries = unit(rng, 3, 4)
  found = Neighbours(
    np.sort(rng.random((3, 6)).astype(np.float32), axis=1)[:, ::-1],
    np.stack([rng.permutation(12)[:6] for _ in range(3)]),
  )
  result = rerank(found, queries, gallery[found.indices[:, :4]])
  for row, before, query, scores in zip(
    result.indices, found.indices, queries, result.scores, strict=True
  ):
    head = sorted(before[:4], key=lambda i: -float(gallery[i] @ query))
    np.testing.assert_array_equal(row, [*head, *before[4:]])
    np.testing.assert_allclose(scores[:4], gallery[row[:4]] @ query, atol=1e-6)
  np.testing.assert_array_equal(result.scores[:, 4:], found.scores[:, 4:])


def test_equal_candidates_stay_as_they_stood(rng):
  found = Neighbours(
    np.ones((1, 3), np.float32), np.array([[7, 2, 5]], np.int64)
  )
  queries = unit(rng, 1, 4)
  same = np.broadcast_to(unit(rng, 4), (1, 3, 4))
  np.testing.assert_array_equal(
    rerank(found, queries, same).indices, [[7, 2, 5]]
  )


@pytest.mark.usefixtures('unchecked')
def test_more_candidates_than_results_are_refused(rng):
  found = Neighbours(np.ones((1, 3), np.float32), np.zeros((1, 3), np.int64))
  with pytest.raises(ValueError, match='more candidates than'):
    rerank(found, unit(rng, 1, 4), unit(rng, 1, 5, 4))


@pytest.mark.parametrize('exclude_self', [False, True])
def test_refinement_without_training_is_the_formula(rng, exclude_self):
  centre = unit(rng, 1, 8)
  vectors = centre + 0.3 * unit(rng, 40, 8)
  vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  refined = neighbour_refinement(
    vectors, vectors, exclude_self=exclude_self, block=16
  )
  exact = vectors.astype(np.float64)
  for i, row in enumerate(exact):
    scores = exact @ row
    near = np.argsort(-scores - (10 if exclude_self else 0) * 0, kind='stable')
    near = [j for j in near if not (exclude_self and j == i)][:9]
    moved = row + 0.15 * sum(scores[j] * exact[j] for j in near)
    moved = moved / (1 + 0.15 * sum(scores[near]))
    np.testing.assert_allclose(
      refined[i], moved / np.linalg.norm(moved), atol=2e-6
    )


def test_refinement_with_a_small_gallery_and_with_opposites(rng):
  vectors = unit(rng, 2, 4)
  refined = neighbour_refinement(vectors, -vectors[:1])
  expected = vectors[0] * (1 + 0.15)
  np.testing.assert_allclose(
    refined[0], expected / np.linalg.norm(expected), atol=1e-6
  )
  np.testing.assert_allclose(np.linalg.norm(refined, axis=1), 1, atol=1e-6)
