"""Tests of `msba_jax.retrieval.evaluate`, with the models themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.data.errors import InputError
from msba_jax.data.source import Evaluation
from msba_jax.metrics import evaluate_retrieval
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.context import Context
from msba_jax.models.msba import msba
from msba_jax.models.msw import MultiScaleWindows
from msba_jax.retrieval.embed import Embedder, embed
from msba_jax.retrieval.evaluate import (
  average,
  evaluate_modes,
  score_classification,
)
from msba_jax.retrieval.index import build_index, search_index
from msba_jax.retrieval.rerank import neighbour_refinement, refine_by_neighbours

MODES = ('solo', 'neighbours', 'memory', 'refinement')


def test_every_mode_is_scored_in_the_order_of_the_source(
  embedder, pictures, make_pictures, meshes, rng
):
  gallery = make_pictures(30, seed=3)
  context = Context(
    jnp.asarray(rng.normal(size=(2, 7, 4, 6)), jnp.float32),
    jnp.ones(7, bool),
  )
  options = {'mesh': meshes[1], 'progress': False}
  scores = evaluate_modes(
    embedder,
    Evaluation(pictures, gallery),
    modes=MODES,
    memory=context,
    neighbours=4,
    batch_size=16,
    **options,
  )
  assert tuple(scores) == MODES
  asked, stored = (
    embed(embedder, source, batch_size=16, keep_regions=True, **options)
    for source in (pictures, gallery)
  )
  answers = stored.regions, stored.vectors
  expected = {
    'solo': (asked.vectors, stored.vectors),
    'neighbours': [
      refine_by_neighbours(
        embedder, part.regions, part.vectors, *answers, k=4,
        exclude_self=part is stored, **options,
      )
      for part in (asked, stored)
    ],
    'memory': [
      embed(
        embedder, source, batch_size=16, context=context, **options
      ).vectors
      for source in (pictures, gallery)
    ],
    'refinement': [
      neighbour_refinement(
        part.vectors, stored.vectors, exclude_self=part is stored
      )
      for part in (asked, stored)
    ],
  }  # fmt: skip
  for mode, (queries, answering) in expected.items():
    right = evaluate_retrieval(
      queries, pictures.labels, answering, gallery.labels
    )
    assert right['valid'].all()
    assert scores[mode]['ap'].shape == (50,)
    # Another order of the batch may exchange two answers that are alike.
    same = np.isclose(scores[mode]['ap'], right['ap'], atol=1e-6)
    assert same.mean() > 0.95, mode
  assert not np.allclose(scores['solo']['ap'], scores['neighbours']['ap'])


def test_all_against_all_and_a_class_of_one(embedder, make_pictures, meshes):
  source = make_pictures(20, classes=3)
  source.labels[:] = [0] + [1, 2] * 9 + [1]
  scores = evaluate_modes(
    embedder, Evaluation(source, None), modes=('solo',), mesh=meshes[1],
    progress=False,
  )['solo']  # fmt: skip
  assert np.flatnonzero(np.isnan(scores['recall@1'])).tolist() == [0]
  means = average(scores)
  assert means['ap'] == pytest.approx(float(scores['ap'][1:].mean()))
  source.labels[:] = np.arange(20)
  source.class_names = tuple(map(str, range(20)))
  with pytest.raises(InputError, match='none of 20 queries'):
    evaluate_modes(
      embedder, Evaluation(source, None), modes=('solo',), mesh=meshes[1],
      progress=False,
    )  # fmt: skip


def test_memory_needs_a_memory(embedder, pictures):
  with pytest.raises(ValueError, match='needs a memory'):
    evaluate_modes(embedder, Evaluation(pictures, None), modes=('memory',))


@pytest.mark.slow
def test_the_system_itself_is_indexed_searched_and_evaluated(
  make_pictures, meshes, tmp_path
):
  pictures = make_pictures(20)
  backbone = ConvNet(ConvSpec((4,), (1,), stem_stride=2, levels=1))
  model = msba(backbone, features=8, embedding=6, num_heads=2)
  model = model.clone(msw=MultiScaleWindows(8, 2, (1, 2)))
  init = jax.jit(model.init)
  params = init(jax.random.key(0), jnp.zeros((2, 8, 8, 3)))['params']
  system = Embedder(model, params, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))
  options = {'mesh': meshes[1], 'neighbours': 4, 'progress': False}
  index = build_index(
    tmp_path / 'index', system, pictures, regions=True, batch_size=20,
    mesh=meshes[1], progress=False,
  )  # fmt: skip
  assert index.regions.shape == (20, 1, 5, 8)
  found = {
    mode: search_index(index, system, pictures, 5, mode=mode, **options)
    for mode in ('solo', 'neighbours')
  }
  np.testing.assert_array_equal(found['solo'].indices[:, 0], np.arange(20))
  scores = evaluate_modes(
    system, Evaluation(pictures, None), batch_size=20, **options
  )
  assert not np.array_equal(scores['solo']['ap'], scores['neighbours']['ap'])


def test_images_are_classified_by_the_direction_of_a_proxy(rng):
  vectors = rng.normal(size=(40, 5)).astype(np.float32)
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  proxies = rng.normal(size=(7, 5)) * rng.uniform(0.1, 9, (7, 1))
  labels = rng.integers(0, 7, 40)
  scores = score_classification(vectors, labels, proxies)
  cosines = vectors @ (proxies / np.linalg.norm(proxies, axis=1)[:, None]).T
  own = cosines[np.arange(40), labels]
  ranks = (cosines > own[:, None]).sum(axis=1) + 1
  np.testing.assert_array_equal(scores['recall@1'], ranks == 1)
  np.testing.assert_array_equal(scores['recall@4'], ranks <= 4)
  np.testing.assert_allclose(scores['ap'], 1 / ranks, rtol=1e-6)


def test_a_classifier_is_no_way_to_embed(embedder, pictures):
  with pytest.raises(ValueError, match='no way to embed'):
    evaluate_modes(embedder, Evaluation(pictures, None), modes=['classifier'])
