"""Tests of the causal graph in the report, with a small CASTLE."""

import functools
import html.parser
import re
import xml.etree.ElementTree as ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.data.source import Evaluation, SubsetSource
from msba_jax.data.transforms import normalize_image
from msba_jax.metrics import evaluate_retrieval
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.castle import castle
from msba_jax.models.context import Context, Solo, batch, solo
from msba_jax.models.controls import BackboneOnly
from msba_jax.retrieval.embed import Embedder, embed
from msba_jax.retrieval.evaluate import embed_modes
from msba_jax.retrieval.report import arrows
from msba_jax.retrieval.report.causal import batch_graph, leave_each_out
from msba_jax.retrieval.report.collect import RunInfo, collect_report
from msba_jax.retrieval.report.data import (
  CausalMap,
  LeftOut,
  Picture,
  ReportData,
  WhatIf,
)
from msba_jax.retrieval.report.examples import Examples
from msba_jax.retrieval.report.page import render_report
from msba_jax.retrieval.search import search

EVIL = '<script>alert(1)</script>"\'&'
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)
BACKBONE = ConvNet(ConvSpec((8, 8), (1, 1), stem_stride=1, levels=2))
NEIGHBOURS = 5
QUERY = 1
KNOWN = (
  ((0.0, 0.3, 0.0), (0.1, 0.0, 0.3), (0.0, 0.0, 0.0)),
  ((0.0, 0.2, 0.2), (0.3, 0.0, 0.0), (0.0, 0.6, 0.0)),
)


class Known(nn.Module):
  """Tells a graph that is known beforehand; a context changes nothing."""

  contextual = True

  @nn.compact
  def __call__(self, images, *, context=solo, train=False):
    del train
    return self.refine(images.mean((1, 2))[None, :, None], context=context)

  @nn.nowrap
  def refine(self, regions, *, context=solo):
    pooled = regions.mean((0, 2))
    vectors = pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)
    out = {'solo': vectors, 'context': vectors, 'regions': regions}
    if not isinstance(context, Solo):
      n, m = len(vectors), len(context.valid)
      scores = jnp.full((2, n, m), 1 / m)
      graph = (
        jnp.zeros((2, n, n)).at[:, :3, :3].set(jnp.array(KNOWN)[:, :n, :n])
      )
      out['aux'] = {'graph': {'graph': graph, 'scores': scores}}
    return vectors, out


def shapes_of(model):
  images = jnp.zeros((1, 8, 8, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  return variables.get('params', {})


def make(model):
  """Random parameters, drawn by their shapes: nothing is compiled for them."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    spread = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
    middle = 5.0 if leaf.ndim == 0 else float(path[-1].key == 'scale')
    return rng.normal(middle, spread, leaf.shape).astype(np.float32)

  params = jax.tree.map_with_path(draw, shapes_of(model))
  return Embedder(model, params, MEAN, STD)


# What neither the graph nor the context depends on takes long to compile.
make_model = functools.partial(
  castle,
  BACKBONE,
  features=8,
  embedding=6,
  num_heads=2,
  counterfactual=False,
  effect=False,
  heads=False,
)


@functools.cache
def make_castle():
  return make(make_model())


@pytest.fixture(scope='module')
def evaluation(pictures):
  return Evaluation(pictures, None)


@pytest.fixture(scope='module')
def vectors(evaluation):
  return embed_modes(
    make_castle(), evaluation, neighbours=NEIGHBOURS, progress=False
  )


@pytest.fixture(scope='module')
def what_if(evaluation, vectors):
  return leave_each_out(
    make_castle(),
    evaluation,
    evaluation,
    [QUERY, 3],
    (vectors['solo'], vectors['neighbours']),
    neighbours=NEIGHBOURS,
  )


def make_examples(source):
  return Examples(Evaluation(source, None), {}, {})


def make_picture(name, label='ant'):
  return Picture(np.full((9, 9, 3), 90, np.uint8), name, label)


def make_graph(weights, labels):
  pictures = [make_picture(f'p{i}', label) for i, label in enumerate(labels)]
  return CausalMap(tuple(pictures), np.asarray(weights, np.float64))


def test_graph_is_what_the_model_tells(pictures):
  indices = np.array([4, 9, 2])
  graph = batch_graph(make(Known()), pictures, make_examples(pictures), indices)
  np.testing.assert_allclose(graph.weights, KNOWN, rtol=1e-6)
  assert [p.id for p in graph.pictures] == [pictures.ids[i] for i in indices]
  shown = arrows.layout(graph)
  # Means over the levels: image 3 (row 2) depends on image 2 most, by 0.3.
  rows = [
    (r['target'][0], r['source'][0], r['strength']) for r in shown['rows']
  ]
  assert rows == [
    ('3', '2', '30.0\xa0%'),
    ('1', '2', '25.0\xa0%'),
    ('2', '1', '20.0\xa0%'),
    ('2', '3', '15.0\xa0%'),
    ('1', '3', '10.0\xa0%'),
  ]
  assert shown['rows'][1]['levels'] == ['30.0\xa0%', '20.0\xa0%']


def test_graph_is_that_of_the_batch_itself(pictures):
  embedder, indices = make_castle(), np.arange(8)
  graph = batch_graph(embedder, pictures, make_examples(pictures), indices)
  images = normalize_image(
    jnp.asarray(pictures.images[indices]), mean=MEAN, std=STD
  )
  _, out = jax.jit(embedder.model.apply)(
    embedder.variables, images, context=batch(jnp.ones(8, bool))
  )
  expected = np.asarray(out['aux']['graph']['graph'])
  assert expected.shape == (2, 8, 8)
  assert expected.max() > 0.05
  # Regions went through float16.
  np.testing.assert_allclose(graph.weights, expected, atol=5e-3)


def test_one_image_has_no_graph(pictures):
  examples = make_examples(pictures)
  assert batch_graph(make(Known()), pictures, examples, np.array([1])) is None


def test_leaving_out_equals_an_application_without_the_image(
  what_if, pictures, vectors
):
  embedder = make_castle()
  query = pictures.ids.index(what_if.query.id)
  assert query == QUERY
  own = np.array([query])
  near = search(
    vectors['solo'].queries[own],
    vectors['solo'].queries,
    NEIGHBOURS,
    exclude=own,
  ).indices[0]
  stored = embed(embedder, pictures, keep_regions=True, progress=False).regions
  stored = jnp.moveaxis(jnp.asarray(stored, jnp.float32), 0, 1)

  @jax.jit
  def refine(neighbours):
    valid = jnp.ones(neighbours.shape[1], bool)
    embeddings, out = embedder.model.apply(
      embedder.variables,
      stored[:, own],
      context=Context(neighbours, valid),
      method='refine',
    )
    return embeddings[0], out['aux']['graph']['scores'][:, 0].mean(axis=0)

  whole, scores = map(np.asarray, refine(stored[:, near]))
  np.testing.assert_allclose(
    whole, vectors['neighbours'].queries[query], atol=1e-5
  )
  found = {
    pictures.ids.index(lost.picture.id): lost for lost in what_if.left_out
  }
  assert set(found) == set(near.tolist())
  for i, image in enumerate(near):
    # The context really lacks the image: it is not even masked.
    alone, _ = refine(stored[:, np.delete(near, i)])
    lost = found[image]
    assert lost.cosine == pytest.approx(float(alone @ whole), abs=2e-6)
    assert lost.score == pytest.approx(float(scores[i]), abs=1e-5)
    assert lost.correct == (pictures.labels[image] == pictures.labels[query])
    gallery = np.delete(vectors['neighbours'].queries, query, axis=0)
    labels = np.delete(pictures.labels, query)
    order = np.argsort(-(gallery @ np.asarray(alone)), kind='stable')
    right = labels[order] == pictures.labels[query]
    assert lost.first_right == right.argmax() + 1
    expected = evaluate_retrieval(
      np.asarray(alone)[None], pictures.labels[own], gallery, labels
    )['ap'][0]
    # Two images that are nearly alike may change places.
    assert lost.average_precision == pytest.approx(expected, abs=1e-2)
  cosines = [lost.cosine for lost in what_if.left_out]
  assert cosines == sorted(cosines)
  assert cosines[0] < 0.9997, 'nothing changes, nothing is tested'


def test_whole_context_scores_as_the_mode_does(what_if, pictures, vectors):
  scores = evaluate_retrieval(vectors['neighbours'].queries, pictures.labels)
  assert what_if.average_precision == pytest.approx(
    scores['ap'][QUERY], abs=1e-5
  )


def test_gallery_answers_and_a_query_without_answer_is_passed_over(
  pictures, make_pictures
):
  gallery = make_pictures(12, seed=3)
  few = SubsetSource(
    gallery, np.flatnonzero(gallery.labels < 4), classes=range(8)
  )
  answered = np.isin(pictures.labels, few.labels)
  asking = [int(np.argmin(answered)), int(np.argmax(answered))]
  evaluation = Evaluation(pictures, few)
  found = embed_modes(
    make_castle(), evaluation, neighbours=NEIGHBOURS, progress=False
  )
  ask = functools.partial(
    leave_each_out,
    make_castle(),
    evaluation,
    evaluation,
    vectors=(found['solo'], found['neighbours']),
    neighbours=NEIGHBOURS,
  )
  what_if = ask(asking)
  assert what_if.query.id == pictures.ids[asking[1]]
  for lost in what_if.left_out:
    image = few[few.ids.index(lost.picture.id)]['image']
    np.testing.assert_array_equal(lost.picture.image, image)
  assert ask(asking[:1]) is None


def collect(embedder, evaluation, *, given=True):
  vectors = embed_modes(
    embedder, evaluation, neighbours=NEIGHBOURS, progress=False
  )
  alone = vectors['solo'].queries
  return collect_report(
    embedder,
    evaluation,
    RunInfo('Trial'),
    scores={},
    results={'solo': search(alone, alone, 5, exclude_self=True)},
    vectors=vectors if given else None,
    neighbours=NEIGHBOURS,
  )


def test_report_has_the_section(evaluation):
  data = collect(make(Known()), evaluation)
  labels = [picture.label for picture in data.causal.pictures]
  assert len(set(labels)) == 4
  np.testing.assert_allclose(data.causal.weights[:, :3, :3], KNOWN, rtol=1e-6)
  assert len(data.what_if.left_out) == NEIGHBOURS
  assert data.what_if.query.id == data.queries[0].query.id
  for lost in data.what_if.left_out:
    assert lost.score == pytest.approx(1 / NEIGHBOURS)
    assert lost.cosine == pytest.approx(1)
    assert lost.average_precision == data.what_if.average_precision
  page = render_report(data)
  assert '<a href="#causal">' in page
  assert page.count('<section id="causal">') == 1
  assert 'Causal graph of a batch' in page
  assert 'What if this image were not there?' in page
  assert page.count('alt="Neighbour, ') == NEIGHBOURS


def test_without_vectors_the_graph_stands_alone(evaluation):
  data = collect(make(Known()), evaluation, given=False)
  assert data.what_if is None
  page = render_report(data)
  assert 'Causal graph of a batch' in page
  assert 'What if this image' not in page


def test_model_without_a_graph_has_no_section(evaluation):
  data = collect(make(BackboneOnly(BACKBONE)), evaluation)
  assert data.causal is None
  assert data.what_if is None
  page = render_report(data)
  assert 'id="causal"' not in page
  assert '#causal' not in page


def test_a_graph_of_content_is_not_causal(pictures):
  def of(model):
    embedder = Embedder(model, shapes_of(model), MEAN, STD)
    return batch_graph(
      embedder, pictures, make_examples(pictures), np.arange(3)
    )

  # Without parameters nothing could be computed: the answer is known before.
  assert of(make_model(graph=False)) is None
  with pytest.raises(TypeError, match='ShapeDtypeStruct'):
    of(make_model())


class Page(html.parser.HTMLParser):
  """All tags of a page with their attributes."""

  def __init__(self, text):
    super().__init__()
    self.tags = []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))


def test_section_runs_nothing_and_escapes_what_users_wrote():
  rng = np.random.default_rng(0)
  picture = make_picture(EVIL, EVIL)
  lost = LeftOut(picture, True, 0.5, 0.98765, 0.25, 3)
  page = render_report(
    ReportData(
      'Trial',
      causal=CausalMap((picture,) * 5, rng.random((2, 5, 5))),
      what_if=WhatIf(picture, 0.5, 1, (lost,) * 10),
    )
  )
  parts = Page(page)
  assert not [tag for tag, _ in parts.tags if tag == 'script']
  for tag, attributes in parts.tags:
    assert 'style' not in attributes, 'inline styles are blocked by the policy'
    for name, value in attributes.items():
      assert not name.startswith('on'), f'{tag} has a handler'
      if name in {'src', 'href', 'srcset'}:
        assert value.startswith(('data:', '#')), f'{tag} {name} {value[:40]}'
  drawing = re.search(r'<svg[^>]*aria-label="Causal.*?</svg>', page, re.DOTALL)[
    0
  ]
  root = ElementTree.fromstring(drawing)
  assert len([e for e in root.iter() if e.tag == 'image']) == 5
  assert len([e for e in root.iter() if e.get('class') == 'arrow within']) == 10
  assert 'Table of the 10 arrows' in page
  for text in ('0.98765', '−25.0', '25.0\xa0%', 'The other 2'):
    assert text in page, text


def test_arrows_run_from_cause_to_dependent_with_their_strength():
  weights = np.zeros((1, 4, 4))
  weights[0, 2, 0] = 0.4  # image 2 depends on image 0
  weights[0, 0, 2] = 0.1
  shown = arrows.layout(make_graph(weights, 'aabb'))
  weak, strong = shown['arrows']
  assert strong['title'].startswith('3. p2 (b) depends on 1. p0 (a): 40.0')
  assert strong['kind'] == 'across'
  assert float(strong['width']) > 2 * float(weak['width'])
  centres = {
    face['number']: np.array([float(face['x']), float(face['y'])])
    + shown['face'] / 2
    for face in shown['faces']
  }
  start, tip = (
    np.array(re.findall(r'-?[\d.]+', text)[:2], float)
    for text in (strong['shaft'], strong['head'])
  )
  assert np.linalg.norm(start - centres[1]) < shown['face']
  assert np.linalg.norm(tip - centres[3]) < shown['face']
  # The opposite arrow bends to the other side.
  bends = [
    np.array(re.findall(r'-?[\d.]+', a['shaft'])[2:4], float)
    for a in (weak, strong)
  ]
  assert np.linalg.norm(bends[0] - bends[1]) > 30


def test_only_the_strongest_arrows_are_drawn(rng):
  weights = rng.random((6, 6))
  weights[4] = 0
  np.fill_diagonal(weights, 9.0)  # of itself nobody speaks
  edges = arrows.strongest_edges(weights, most=2)
  assert len(edges) == 10
  assert [e.strength for e in edges] == sorted(
    (e.strength for e in edges), reverse=True
  )
  np.fill_diagonal(weights, 0.0)
  for n in (0, 1, 2, 3, 5):
    kept = {e.source for e in edges if e.target == n}
    assert kept == set(np.argsort(weights[n])[-2:].tolist())


def test_a_level_can_be_drawn_alone():
  graph = make_graph(KNOWN, 'aab')
  row = arrows.layout(graph, level=1)['rows'][0]
  assert (row['target'][0], row['source'][0]) == ('3', '2')
  assert row['strength'] == '60.0\xa0%'


def test_faces_do_not_overlap():
  graph = make_graph(np.zeros((1, 12, 12)), 'aaabbbcccddd')
  shown = arrows.layout(graph)
  places = np.array([(float(f['x']), float(f['y'])) for f in shown['faces']])
  distances = np.abs(places[:, None] - places[None]).max(axis=-1)
  np.fill_diagonal(distances, np.inf)
  assert distances.min() > shown['face']
  assert [group['full'] for group in shown['groups']] == list('abcd')


def test_summary_counts_the_strength_inside_classes():
  weights = np.zeros((2, 4, 4))
  weights[:, 0, 1], weights[:, 2, 0] = 0.3, 0.1
  text = arrows.summary(make_graph(weights, 'aabb'))
  assert text.startswith('75.0\xa0% of the strength')
  assert text.endswith('33.3\xa0%.')
  assert arrows.summary(make_graph(weights, ['a', 'a', '', ''])) == ''
  none = make_graph(np.zeros((2, 4, 4)), 'aabb')
  assert arrows.summary(none).startswith('No image depends')
  assert 'Table of the' not in render_report(ReportData('Trial', causal=none))


def test_graph_must_fit_its_pictures():
  with pytest.raises(ValueError, match='does not fit 3 pictures'):
    arrows.layout(make_graph(np.ones((1, 2, 2)), 'abc'))
