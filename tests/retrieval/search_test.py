"""Tests of `msba_jax.retrieval.search`."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.retrieval.devices import local_mesh
from msba_jax.retrieval.search import search

TWO = local_mesh(jax.devices()[:2])


def reference(queries, gallery, k, exclude=None):
  """All scores in float64, sorted by score and then by index."""
  scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
  if exclude is not None:
    scores[np.arange(len(queries)), exclude] = -np.inf
  order = np.argsort(-scores, axis=1, kind='stable')[:, :k]
  return np.take_along_axis(scores, order, axis=1), order


def vectors(rng, count, size=16):
  drawn = rng.normal(size=(count, size)).astype(np.float32)
  return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@hypothesis.given(
  count=st.integers(1, 5), number=st.integers(1, 300),
  k=st.sampled_from([1, 7, 200]),
  seed=st.integers(0, 99),
)  # fmt: skip
@hypothesis.settings(max_examples=6)
def test_equals_sorting_all_scores(count, number, k, seed):
  rng = np.random.default_rng(seed)
  queries, gallery = vectors(rng, count), vectors(rng, number)
  found = search(queries, gallery, k, block=128, mesh=TWO)
  scores, _ = reference(queries, gallery, k)
  assert found.indices.shape == (count, min(k, number))
  np.testing.assert_allclose(found.scores, scores, atol=1e-6)
  # Float32 may exchange what float64 tells apart; each still has its score.
  own = np.einsum('qe,qke->qk', queries, gallery[found.indices])
  np.testing.assert_allclose(own, scores, atol=1e-6)
  assert all(len(set(row)) == len(row) for row in found.indices.tolist())


def test_the_same_bits_on_any_number_of_devices_and_pieces(rng):
  gallery = np.repeat(vectors(rng, 500), 3, axis=0)  # three rows each tie
  queries = vectors(rng, 20)
  results = [
    search(
      queries,
      gallery,
      7,
      block=128,
      mesh=local_mesh(jax.devices()[:devices]),
      piece_bytes=piece_bytes,
    )
    for devices, piece_bytes in [(1, 1), (1, 2**20), (2, 1), (4, 1), (8, 1)]
  ]
  np.testing.assert_array_equal(
    results[0].indices, reference(queries, gallery, 7)[1]
  )
  for result in results[1:]:
    np.testing.assert_array_equal(result.indices, results[0].indices)
    np.testing.assert_array_equal(result.scores, results[0].scores)


def test_more_queries_than_a_device_scores_at_once(rng):
  queries, gallery = vectors(rng, 1100, 4), vectors(rng, 50, 4)
  found = search(queries, gallery, 3, mesh=TWO)
  np.testing.assert_array_equal(
    found.indices, reference(queries, gallery, 3)[1]
  )


def test_no_image_answers_itself(rng):
  rows = vectors(rng, 300)
  found = search(rows, rows, 300, exclude_self=True, block=128, mesh=TWO)
  assert found.indices.shape == (300, 299)
  np.testing.assert_array_equal(
    np.sort(found.indices, axis=1),
    [np.delete(np.arange(300), i) for i in range(300)],
  )
  assert search(rows[:1], rows[:1], 3, exclude_self=True).indices.size == 0


def test_one_row_of_each_query_is_excluded(rng):
  gallery = vectors(rng, 300)
  chosen = np.array([270, 3, 3, 140])
  found = search(gallery[chosen], gallery, 4, exclude=chosen, mesh=TWO)
  np.testing.assert_array_equal(
    found.indices, reference(gallery[chosen], gallery, 4, chosen)[1]
  )


def test_a_memory_mapped_gallery_in_pieces(rng, tmp_path):
  gallery = vectors(rng, 3000)
  np.save(tmp_path / 'vectors.npy', gallery)
  mapped = np.load(tmp_path / 'vectors.npy', mmap_mode='r')
  queries = vectors(rng, 3)
  found = search(
    queries,
    mapped,
    5,
    block=128,
    mesh=TWO,
    piece_bytes=256 * 16 * 4,
  )
  np.testing.assert_array_equal(
    found.indices, reference(queries, gallery, 5)[1]
  )


def test_nothing_asked_and_nothing_to_answer(rng):
  rows = vectors(rng, 3)
  assert search(rows[:0], rows, 2).indices.shape == (0, 2)
  assert search(rows, rows[:0], 2).indices.shape == (3, 0)


@pytest.mark.usefixtures('unchecked')
def test_what_does_not_fit_is_named(rng):
  rows = vectors(rng, 3)
  with pytest.raises(ValueError, match='one embedding size'):
    search(rows, rows[:, :4], 1)
  with pytest.raises(ValueError, match='k=0'):
    search(rows, rows, 0)
  with pytest.raises(ValueError, match='the same rows'):
    search(rows[:2], rows, 1, exclude_self=True)
  with pytest.raises(ValueError, match='not both'):
    search(rows, rows, 1, exclude_self=True, exclude=np.arange(3))
  with pytest.raises(ValueError, match='must name a row'):
    search(rows, rows, 1, exclude=np.arange(2))
