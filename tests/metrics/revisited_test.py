"""Tests of `msba_jax.metrics.revisited` against the published evaluation."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.metrics.retrieval import summarize
from msba_jax.metrics.revisited import Relevance, evaluate_revisited

KS = (1, 5, 10)


def published(scores, positives, junk, ks=KS):
  """AP and P@k of one query as the published protocol words them, float64."""
  order = np.argsort(-scores, kind='stable')
  places = np.flatnonzero(np.isin(order, positives))
  ignored = np.flatnonzero(np.isin(order, junk))
  if not len(positives):
    return None
  places = np.array([p - np.sum(ignored < p) for p in places])
  total = 0.0
  for found, place in enumerate(places):
    before = 1.0 if place == 0 else found / place
    total += (before + (found + 1) / (place + 1)) / (2 * len(positives))
  depths = [min(places.max() + 1, k) for k in ks]
  return [total] + [np.sum(places < depth) / depth for depth in depths]


def lists_of(rng, queries, images, share):
  """Random disjoint lists; with a small share some of them are empty."""
  kinds = rng.choice(4, (queries, images), p=[1 - 3 * share, *[share] * 3])
  return [
    Relevance(*(np.flatnonzero(row == kind) for kind in (1, 2, 3)))
    for row in kinds
  ]


@hypothesis.settings(max_examples=6)
@hypothesis.given(
  n=st.sampled_from([5, 130]), share=st.sampled_from([0.02, 0.3]),
  ties=st.booleans(), block=st.sampled_from([None, 8]), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_published_protocol(n, share, ties, block, seed):
  rng = np.random.default_rng(seed)
  queries, gallery = rng.normal(size=(11, 2)), rng.normal(size=(n, 2))
  if ties:
    queries, gallery = queries.round(), gallery.round()
  queries, gallery = queries.astype(np.float32), gallery.astype(np.float32)
  lists = lists_of(rng, 11, n, share)
  scores = evaluate_revisited(queries, gallery, lists, block=block)
  products = queries.astype(np.float64) @ gallery.astype(np.float64).T
  for name, found in scores.items():
    for row, (easy, hard, junk) in enumerate(lists):
      positives, ignored = {
        'easy': (easy, np.concatenate([junk, hard])),
        'medium': (np.concatenate([easy, hard]), junk),
        'hard': (hard, np.concatenate([junk, easy])),
      }[name]
      expected = published(products[row], positives, ignored)
      keys = ['ap_trapezoidal', *(f'precision@{k}' for k in KS)]
      values = [found[key][row] for key in keys]
      assert found['valid'][row] == (expected is not None)
      np.testing.assert_allclose(values, expected or [0] * 4, rtol=1e-6)


def test_means_leave_out_queries_without_positives(rng):
  gallery = rng.normal(size=(6, 3)).astype(np.float32)
  lists = [Relevance(easy=[0]), Relevance(hard=[1]), Relevance()]
  scores = evaluate_revisited(gallery[:3], gallery, lists)
  assert scores['easy']['valid'].tolist() == [True, False, False]
  assert scores['medium']['valid'].tolist() == [True, True, False]
  mean = summarize(scores['medium'])['ap_trapezoidal']
  assert mean == pytest.approx(scores['medium']['ap_trapezoidal'][:2].mean())


def test_junk_before_a_positive_is_not_counted():
  gallery = np.array([[3.0], [2.0], [1.0]], np.float32)
  query = np.ones((1, 1), np.float32)
  with_junk = evaluate_revisited(
    query, gallery, [Relevance(easy=[2], junk=[0], hard=[1])]
  )
  assert with_junk['easy']['ap_trapezoidal'][0] == 1
  assert with_junk['medium']['precision@5'][0] == 1
  without = evaluate_revisited(query, gallery, [Relevance(easy=[2])])
  assert without['easy']['ap_trapezoidal'][0] == pytest.approx(1 / 6)
  assert without['easy']['precision@10'][0] == pytest.approx(1 / 3)


def test_lists_that_do_not_fit_are_named(rng):
  images = rng.normal(size=(4, 3)).astype(np.float32)
  for message, lists, ks in (
    ('query 0 lists image 4, but the gallery has 4', [Relevance([4])], KS),
    ('image -1', [Relevance([-1])], KS),
    ('query 0 lists image 2 more than once', [Relevance([2], [2])], KS),
    ('0 lists of relevant images for 1', [], KS),
    ('ks=', [Relevance([0])], (0,)),
  ):
    with pytest.raises(ValueError, match=message):
      evaluate_revisited(images[:1], images, lists, ks=ks)
