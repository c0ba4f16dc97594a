"""Tests of what a report is made of, with a small MSBA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.data.source import Evaluation
from msba_jax.data.transforms import normalize_image
from msba_jax.metrics import evaluate_retrieval
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.bcp import BidirectionalContext
from msba_jax.models.caf import ContentAdaptiveFusion
from msba_jax.models.cfi import CrossLevelIntegration
from msba_jax.models.context import batch
from msba_jax.models.controls import BackboneOnly
from msba_jax.models.msba import MSBA
from msba_jax.models.msw import MultiScaleWindows
from msba_jax.retrieval.embed import Embedder
from msba_jax.retrieval.report.collect import RunInfo, collect_report, flatten
from msba_jax.retrieval.report.examples import draw_batch
from msba_jax.retrieval.report.page import render_report
from msba_jax.retrieval.report.summaries import average_modes, mask_scores
from msba_jax.retrieval.rerank import neighbour_refinement
from msba_jax.retrieval.search import Neighbours, search

INFO = RunInfo(
  'Trial',
  command='msba report runs/trial',
  rows=[{'step': s, 'phase': 'train', 'loss': 3.0 - s} for s in range(3)],
  configuration={'optimizer': {'learning_rate': 1e-3}, 'seed': 0},
  environment={'devices': ['cpu', 8], 'commit': None},
)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)
BACKBONE = ConvNet(ConvSpec((8,), (1,), levels=1))


def make(model):
  images = jnp.zeros((1, 8, 8, 3))
  params = jax.jit(model.init)(jax.random.key(0), images)['params']
  return Embedder(model, params, MEAN, STD)


@pytest.fixture(scope='module')
def small():
  return make(
    MSBA(
      backbone=BACKBONE,
      msw=MultiScaleWindows(8, 2, parts=(1, 2)),
      bcp=BidirectionalContext(2),
      cfi=CrossLevelIntegration(),
      caf=ContentAdaptiveFusion(6),
    )
  )


@pytest.fixture(scope='module')
def inputs(pictures):
  """Scores and results of two modes, all images against all."""
  vectors = np.random.default_rng(1).normal(size=(len(pictures), 6))
  vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(
    np.float32
  )
  moved = neighbour_refinement(vectors, vectors, exclude_self=True)
  return {
    'scores': {
      name: evaluate_retrieval(v, pictures.labels)
      for name, v in (('solo', vectors), ('refinement', moved))
    },
    'results': {
      name: search(v, v, 10, exclude_self=True)
      for name, v in (('solo', vectors), ('refinement', moved))
    },
  }


@pytest.fixture(scope='module')
def data(small, pictures, inputs):
  return collect_report(
    small, Evaluation(pictures, None), INFO, **inputs, resamples=50
  )


def test_modes_have_means_intervals_and_gains(data, inputs):
  first, second = data.modes
  scores = inputs['scores']
  for mode in data.modes:
    for name, key in (('Recall@1', 'recall@1'), ('mAP', 'ap')):
      estimate = mode.metrics[name]
      mean = scores[mode.name][key].mean()
      np.testing.assert_allclose(estimate.value, mean, rtol=1e-6)
      assert estimate.low < estimate.value < estimate.high
  assert first.metrics['R-precision'].low is None
  assert not first.gains
  gain = second.metrics['mAP'].value - first.metrics['mAP'].value
  np.testing.assert_allclose(second.gains['mAP'].value, gain, atol=1e-9)
  assert 'valid' not in {name.lower() for name in first.metrics}
  assert '50 resampled' in data.interval


def test_results_are_the_neighbours_of_their_queries(data, pictures, inputs):
  found = inputs['results']['refinement']
  assert len(data.queries) == 6
  for result in data.queries:
    query = pictures.ids.index(result.query.id)
    np.testing.assert_array_equal(result.query.image, pictures.images[query])
    assert result.after is not None
    assert len(result.after.hits) == 8
    for rank, hit in enumerate(result.after.hits):
      index = found.indices[query, rank]
      assert hit.picture.id == pictures.ids[index]
      assert hit.score == found.scores[query, rank]
      assert hit.correct == (pictures.labels[index] == pictures.labels[query])
    right = pictures.labels[found.indices[query]] == pictures.labels[query]
    first = int(right.argmax()) + 1 if right.any() else None
    assert result.after.first_right == first


def test_hardest_queries_are_the_worst_of_their_classes(data, pictures, inputs):
  precision = inputs['scores']['solo']['ap']
  chosen = [pictures.ids.index(result.query.id) for result in data.hardest]
  worst = sorted(
    precision[pictures.labels == label].min() for label in range(8)
  )
  np.testing.assert_allclose(precision[chosen], worst[:6])
  assert len({pictures.labels[i] for i in chosen}) == 6
  assert all(len(result.before.hits) == 4 for result in data.hardest)


def test_recall_per_class_is_the_mean_of_its_queries(data, pictures, inputs):
  assert [row.name for row in data.classes] == list(pictures.class_names)
  for label, row in enumerate(data.classes):
    own = pictures.labels == label
    for mode, recall in (('solo', row.before), ('refinement', row.after)):
      mean = inputs['scores'][mode]['recall@1'][own].mean()
      np.testing.assert_allclose(recall, mean, rtol=1e-6)
    assert row.queries == own.sum()


def test_attention_is_the_mean_over_all_but_the_images(data, small, pictures):
  chosen = [pictures.ids.index(p.id) for p in data.attention.pictures]
  pixels = jnp.asarray(pictures.images[chosen])
  images = normalize_image(pixels, mean=MEAN, std=STD)
  _, out = jax.jit(small.model.apply)(
    {'params': small.params},
    images,
    context=batch(jnp.ones(len(chosen), bool)),
  )
  expected = np.asarray(out['attention']).mean(axis=(0, 1, 2))
  np.testing.assert_allclose(data.attention.weights, expected, atol=1e-5)
  np.testing.assert_allclose(data.attention.weights.sum(axis=1), 1, atol=1e-5)


def test_collected_report_renders(data):
  text = render_report(data)
  assert 'class="absent"' not in text
  assert 'optimizer.learning_rate' in text
  assert dict(data.facts)['Gallery'] == 'the other 49'


def test_model_without_attention_has_none_to_show(pictures, inputs):
  embedder = make(BackboneOnly(BACKBONE))
  data = collect_report(
    embedder,
    Evaluation(pictures, None),
    INFO,
    scores={},
    results={'solo': inputs['results']['solo']},
  )
  assert data.attention is None
  assert data.after is None
  assert data.modes == data.classes == data.hardest == ()
  assert all(result.after is None for result in data.queries)


def test_gallery_answers_where_there_is_one(small, pictures, make_pictures):
  gallery = make_pictures(3, seed=1)
  scores = np.array([0.9, 0.1, -np.inf], np.float32)
  found = Neighbours(
    np.tile(scores, (50, 1)), np.tile(np.array([2, 0, 1]), (50, 1))
  )
  data = collect_report(
    small,
    Evaluation(pictures, gallery),
    dataclasses.replace(INFO, rows=()),
    scores={},
    results={'solo': found},
    queries=1,
    batch_classes=0,
  )
  hits = data.queries[0].before.hits
  assert len(hits) == 2, 'a place without a result shows none'
  np.testing.assert_array_equal(hits[0].picture.image, gallery.images[2])
  assert dict(data.facts)['Gallery'] == '3'
  assert not data.panels


def test_what_does_not_fit_is_refused(small, pictures, inputs):
  evaluation = Evaluation(pictures, None)
  solo = inputs['results']['solo']
  for results in ({}, dict.fromkeys('abc', solo)):
    with pytest.raises(ValueError, match='of one mode or two'):
      collect_report(small, evaluation, INFO, scores={}, results=results)
  short = Neighbours(solo.scores[:5], solo.indices[:5])
  with pytest.raises(ValueError, match='of 5 queries, not 50'):
    collect_report(small, evaluation, INFO, scores={}, results={'solo': short})
  with pytest.raises(ValueError, match='ap of solo is of 2 queries, not 50'):
    collect_report(
      small,
      evaluation,
      INFO,
      scores={'solo': {'ap': np.zeros(2)}},
      results={'solo': solo},
    )


def test_queries_that_nothing_answers_count_nowhere():
  scores = {
    'solo': mask_scores(
      {
        'recall@1': np.array([1.0, 1.0, 0.0]),
        'valid': np.array([True, True, False]),
      }
    )
  }
  (mode,) = average_modes(scores, np.array([0, 1, 1]), 20, 0)
  estimate = mode.metrics['Recall@1']
  assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


def test_batch_holds_classes_together(rng):
  labels = rng.integers(0, 5, 60).astype(np.int32)
  chosen = labels[draw_batch(labels, rng, 3, 4)]
  assert len(chosen) == 12
  assert (chosen.reshape(3, 4) == chosen.reshape(3, 4)[:, :1]).all()
  assert len(np.unique(chosen)) == 3


def test_settings_become_rows():
  rows = flatten({'a': {'b': {'c': 1}}, 'd': (1, 2), 'e': None})
  assert rows == (('a.b.c', '1'), ('d', '1, 2'), ('e', '–'))
