"""Tests of `msba_jax.metrics.retrieval`."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.metrics.retrieval import evaluate_retrieval, summarize


def one_query(scores, relevant, ks=(1, 2, 4, 8)):
  """Every metric of one query from its sorted answers, float64."""
  hits = relevant[np.argsort(-scores, kind='stable')].astype(np.float64)
  number = int(hits.sum())
  if not number:
    return dict.fromkeys(names(ks), 0.0) | {'valid': False}
  precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
  before = np.concatenate([[1.0], precision[:-1]])
  return {
    **{f'recall@{k}': hits[:k].max() for k in ks},
    'precision@1': hits[0],
    'r_precision': hits[:number].sum() / number,
    'map@r': (precision * hits)[:number].sum() / number,
    'ap': (precision * hits).sum() / number,
    'ap_trapezoidal': ((precision + before) / 2 * hits).sum() / number,
    'valid': True,
  }


def names(ks):
  ranked = ['precision@1', 'r_precision', 'map@r', 'ap', 'ap_trapezoidal']
  return [f'recall@{k}' for k in ks] + ranked


def reference(queries, labels, gallery=None, gallery_labels=None):
  """`one_query` for all of them; a gallery of None leaves the query out."""
  own = gallery is None
  if own:
    gallery, gallery_labels = queries, labels
  scores = np.asarray(queries, np.float64) @ np.asarray(gallery, np.float64).T
  rows = []
  for row, label in enumerate(labels):
    keep = np.arange(len(gallery)) != (row if own else -1)
    rows.append(one_query(scores[row, keep], gallery_labels[keep] == label))
  return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def assert_same(scores, expected):
  assert scores.keys() == expected.keys()
  for name, values in expected.items():
    np.testing.assert_allclose(scores[name], values, rtol=1e-6, err_msg=name)


@hypothesis.given(
  n=st.sampled_from([9, 140]), classes=st.sampled_from([1, 7]),
  block=st.sampled_from([None, 3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_all_against_all_with_ties(n, classes, block, seed):
  rng = np.random.default_rng(seed)
  images = rng.integers(-2, 3, (n, 2)).astype(np.float32)
  labels = rng.integers(classes, size=n)
  scores = evaluate_retrieval(images, labels, block=block)
  assert_same(scores, reference(images, labels))


@hypothesis.given(
  q=st.sampled_from([1, 21]), n=st.sampled_from([1, 300]),
  classes=st.sampled_from([1, 12]), seed=st.integers(0, 99),
)  # fmt: skip
def test_queries_against_a_gallery_with_ties(q, n, classes, seed):
  rng = np.random.default_rng(seed)
  queries = rng.integers(-2, 3, (q, 2)).astype(np.float32)
  gallery = rng.integers(-2, 3, (n, 2)).astype(np.float32)
  labels = rng.integers(classes, size=q), rng.integers(classes, size=n)
  scores = evaluate_retrieval(queries, labels[0], gallery, labels[1], block=8)
  assert_same(scores, reference(queries, labels[0], gallery, labels[1]))


def test_real_numbers_in_jax_arrays(rng):
  images = rng.normal(size=(70, 16)).astype(np.float32)
  labels = np.arange(70) % 9
  scores = evaluate_retrieval(jnp.asarray(images), jnp.asarray(labels))
  assert_same(scores, reference(images, labels))
  for name, values in scores.items():
    assert isinstance(values, np.ndarray)
    assert values.dtype == (bool if name == 'valid' else np.float32)


def test_many_slices_of_the_gallery(rng):
  """More images than one slice of 128 for each of 64."""
  gallery = rng.integers(-9, 10, (8200, 2)).astype(np.float32)
  labels = rng.integers(400, size=8200)
  scores = evaluate_retrieval(gallery[:9], labels[:9], gallery, labels)
  assert_same(scores, reference(gallery[:9], labels[:9], gallery, labels))


def test_a_permuted_gallery_scores_the_same(rng):
  queries = rng.normal(size=(10, 8)).astype(np.float32)
  gallery = rng.normal(size=(90, 8)).astype(np.float32)
  labels = rng.integers(5, size=10), rng.integers(5, size=90)
  order = rng.permutation(90)
  scores = evaluate_retrieval(queries, labels[0], gallery, labels[1])
  permuted = evaluate_retrieval(
    queries, labels[0], gallery[order], labels[1][order]
  )
  for name, values in scores.items():
    np.testing.assert_array_equal(permuted[name], values)


def test_a_query_without_positives_is_left_out_of_means(rng):
  images = rng.normal(size=(5, 4)).astype(np.float32)
  labels = np.array(['a', 'a', 'b', 'c', 'c'])
  scores = evaluate_retrieval(images, labels)
  np.testing.assert_array_equal(scores['valid'], labels != 'b')
  means = summarize(scores)
  assert 'valid' not in means
  for name, mean in means.items():
    assert scores[name][2] == 0
    assert mean == pytest.approx(scores[name][labels != 'b'].mean())
  with pytest.raises(ValueError, match='none of 5 queries'):
    summarize(evaluate_retrieval(images, np.arange(5)))


def test_one_class_is_perfect(rng):
  images = rng.normal(size=(12, 4)).astype(np.float32)
  means = summarize(evaluate_retrieval(images, np.zeros(12, int)))
  assert set(means.values()) == {1.0}


def test_one_image_has_nobody_to_find():
  scores = evaluate_retrieval(np.ones((1, 2), np.float32), np.zeros(1, int))
  assert [values.tolist() for values in scores.values()] == [[0.0]] * 9 + [[0]]


@pytest.mark.usefixtures('unchecked')
def test_what_does_not_fit_is_named(rng):
  images, labels = rng.normal(size=(4, 3)).astype(np.float32), np.zeros(4, int)
  for message, arguments, options in (
    ('come together', (images, labels, images), {}),
    (r'\(3,\)', (images, labels[:3]), {}),
    (r'gallery labels .*\(3,\)', (images, labels, images, labels[:3]), {}),
    (r'\(4, 2\)', (images, labels, images[:, :2], labels), {}),
    ('there are no query', (images[:0], labels[:0]), {}),
    ('ks=', (images, labels), {'ks': (0,)}),
    ('block=0', (images, labels), {'block': 0}),
    ('1 of 4 queries are not finite, .* 2', (_broken(images), labels), {}),
    (r'\(4,\)', (labels, labels), {}),
  ):
    with pytest.raises(ValueError, match=message):
      evaluate_retrieval(*arguments, **options)


def _broken(images):
  return np.where(np.arange(4)[:, None] == 2, np.nan, images)
