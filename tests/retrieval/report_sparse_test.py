"""Tests of what a report says of sparse attention, with a small NEXUS."""

import dataclasses
import functools
import html.parser
import itertools
import re
import xml.etree.ElementTree as ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msba_jax.data.source import Evaluation
from msba_jax.data.transforms import normalize_image
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.context import solo
from msba_jax.models.controls import BackboneOnly
from msba_jax.models.msba import msba
from msba_jax.models.nexus import nexus
from msba_jax.retrieval.embed import Embedder
from msba_jax.retrieval.report import stripes
from msba_jax.retrieval.report.collect import RunInfo, collect_report
from msba_jax.retrieval.report.data import (
  Answers,
  Hit,
  KeptRegions,
  Picture,
  QueryResult,
  ReportData,
  SparseMap,
  Stripes,
)
from msba_jax.retrieval.report.examples import Examples
from msba_jax.retrieval.report.page import render_report
from msba_jax.retrieval.report.sparse import where_it_looks
from msba_jax.retrieval.search import search

EVIL = '<script>alert(1)</script>"\'&'
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)
BACKBONE = ConvNet(ConvSpec((8,), (1,), stem_stride=1, levels=1))
BRIGHT = 0.44  # about half of random pixels are
BOTH = ('stripes', 'regions')
DIRECTIONS = ('horizontal', 'vertical', 'diagonal', 'antidiagonal')


class Known(nn.Module):
  """Tells what follows from the mean of an image; levels of 6 × 4 and 2 × 2.

  A bright image has wide stripes, and each of its regions keeps the next one.
  """

  parts: tuple[str, ...] = BOTH

  contextual = False

  @nn.compact
  def __call__(self, images, *, context=solo, train=False):
    del context, train
    mean = images.mean((1, 2, 3))
    n, bright = len(images), mean > BRIGHT
    told = {}
    if 'stripes' in self.parts:
      told['stripe'] = jnp.where(bright, 8, 2)[None].repeat(2, axis=0)
      told['heads'] = jnp.array([[1, 1, 0, 2], [1, 1, 0, 2]])
      told['widths'] = jnp.ones((2, n, 1))
      told['grid'] = jnp.array([[6, 4], [2, 2]])
    if 'regions' in self.parts:
      told['kept'] = jnp.stack([nn.sigmoid(mean), jnp.ones(n)])
      told['cut'] = jnp.array([[3, 2], [1, 1]])
      own = jnp.arange(6)[None].repeat(n, axis=0)
      following = jnp.where(bright[:, None], (own + 1) % 6, -1)
      fine = jnp.stack([own, following, *[-jnp.ones_like(own)] * 4], axis=-1)
      told['blocks'] = fine[:, None], jnp.zeros((n, 1, 1, 1), int)
    vectors = images.reshape(n, -1)[:, :5]
    vectors /= jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors, {'solo': vectors, 'context': vectors, 'aux': {'msw': told}}


def make(model):
  """Random parameters, drawn by their shapes: nothing is compiled for them."""
  # With this seed NEXUS decides differently for images that differ in contrast.
  rng = np.random.default_rng(13)
  variables = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
  )

  def draw(path, leaf):
    if path[-1].key == 'bias' and 'mixer' in jax.tree_util.keystr(path):
      return np.zeros(leaf.shape, np.float32)
    spread = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 1.0
    return rng.normal(0, spread, leaf.shape).astype(np.float32)

  params = jax.tree.map_with_path(draw, variables.get('params', {}))
  return Embedder(model, params, MEAN, STD)


@functools.cache
def make_nexus():
  embedder = make(
    nexus(
      BACKBONE,
      features=8,
      embedding=6,
      heads=(1, 1, 0, 0),
      sparse_heads=2,
      context_heads=4,
      widths=(1, 2),
      region=2,
      ratios=(1 / 8, 1 / 2, 1.0),
      parts=2,
    )
  )
  # Between what images of little and of much contrast lose to narrow stripes.
  width = embedder.params['msw']['level_0']['mixer_0']['width']
  width['offset'] = np.float32(0.026)
  return embedder


def look(embedder, pictures, indices):
  examples = Examples(Evaluation(pictures, None), {}, {})
  return where_it_looks(embedder, pictures, examples, np.asarray(indices))


def normalized(pictures, indices):
  images = jnp.asarray(pictures.images[np.asarray(indices)])
  return normalize_image(images, mean=MEAN, std=STD)


def make_sparse(rng, *, name='p', label='ant', sampled=9, side=12, parts=BOTH):
  shares = rng.random((2, sampled))
  finest = rng.random((6, 2, 6, 6)) < 0.4
  finest |= np.eye(6, dtype=bool)
  return SparseMap(
    tuple(
      Picture(
        rng.integers(0, 256, (side, side // 2, 3), np.uint8),
        f'{name}{i}',
        label,
      )
      for i in range(6)
    ),
    np.arange(6),
    Stripes(
      np.array([[6, 4], [3, 2]]), rng.choice(np.array([1, 2]), (2, sampled))
    )
    if 'stripes' in parts
    else None,
    KeptRegions(np.array([[3, 2], [1, 1]]), shares, finest)
    if 'regions' in parts
    else None,
  )


def cells_of(path, rows, columns):
  """The cells that a path fills, counted."""
  found = np.zeros((rows, columns), int)
  steps = re.findall(r'M(\d+) (\d+)h(\d+)v1(?:H\d+|h-1)z', path)
  assert len(steps) == path.count('M')
  for column, row, width in steps:
    found[int(row), int(column) : int(column) + int(width)] += 1
  return found


def paths_of(panel, kind):
  return [path for path in panel['paths'] if kind in path['kind'].split()]


def test_both_ends_of_the_order_are_shown(pictures):
  indices = np.array([7, 3, 31, 12, 40, 5, 22, 18, 9])
  sparse = look(make(Known()), pictures, indices)
  mean = np.asarray(normalized(pictures, indices)).mean((1, 2, 3))
  order = np.argsort(mean)
  np.testing.assert_array_equal(sparse.shown, order[[0, 1, 2, -3, -2, -1]])
  np.testing.assert_allclose(
    sparse.regions.shares[0], 1 / (1 + np.exp(-mean)), rtol=1e-5
  )
  # Stripes are no wider than the grid.
  expected = np.where(mean > BRIGHT, 6, 2)
  assert set(expected) == {2, 6}
  np.testing.assert_array_equal(sparse.stripes.widths[0], expected)
  np.testing.assert_array_equal(sparse.stripes.widths[1], np.full(9, 2))
  for picture, place, kept in zip(
    sparse.pictures, sparse.shown, sparse.regions.finest, strict=True
  ):
    assert picture.id == pictures.ids[indices[place]]
    np.testing.assert_array_equal(
      picture.image, pictures.images[indices[place]]
    )
    own = np.eye(6, dtype=bool)
    following = np.roll(own, 1, axis=1)
    np.testing.assert_array_equal(
      kept[0], own | following if mean[place] > BRIGHT else own
    )


@pytest.mark.parametrize('part', BOTH)
def test_a_model_may_tell_of_one_part_alone(pictures, part):
  sparse = look(make(Known((part,))), pictures, range(8))
  assert (sparse.stripes is None) == (part == 'regions')
  assert (sparse.regions is None) == (part == 'stripes')
  if part == 'stripes':
    shown = sparse.stripes.widths[0, sparse.shown]
    np.testing.assert_array_equal(shown, np.sort(shown))
    assert shown[0] < shown[-1]
  page = render_report(ReportData('Trial', sparse=sparse))
  section = page[page.index('<section id="sparse">') :]
  section = section[: section.index('</section>')]
  assert ('antidiagonal' in section) == (part == 'stripes')
  assert ('pairs of regions' in section) == (part == 'regions')
  assert section.count('<use ') == 2 * 6


def test_few_images_are_all_shown(pictures):
  sparse = look(make(Known()), pictures, [4])
  np.testing.assert_array_equal(sparse.shown, [0])
  assert stripes.layout(sparse)['choice'] == 'Shown are all 1 images.'
  assert look(make(Known()), pictures, np.zeros(0, int)) is None


def test_nexus_tells_what_it_decides_for_each_image_alone(make_pictures):
  embedder, indices = make_nexus(), np.arange(8)
  pictures = make_pictures(8)
  contrast = np.linspace(0, 1, 8)[:, None, None, None]
  pictures.images = (contrast * pictures.images).astype(np.uint8)
  sparse = look(embedder, pictures, indices)
  one = jax.jit(
    lambda x: embedder.model.apply(embedder.variables, x)[1]['aux']['msw']
  )
  for place, kept in zip(sparse.shown, sparse.regions.finest, strict=True):
    told = one(normalized(pictures, indices[[place]]))
    np.testing.assert_array_equal(
      sparse.stripes.widths[:, place], told['stripe'][:, 0]
    )
    np.testing.assert_allclose(
      sparse.regions.shares[:, place], told['kept'][:, 0], atol=1e-6
    )
    blocks = np.asarray(told['blocks'][0][0])
    assert blocks.shape == kept.shape == (2, 16, 16)
    for row in np.ndindex(2, 16):
      names = blocks[row]
      assert set(np.flatnonzero(kept[row])) == set(names[names >= 0].tolist())
    assert kept.mean() == pytest.approx(sparse.regions.shares[0, place])
  for decided in (sparse.regions.shares, sparse.stripes.widths):
    assert len(np.unique(decided[0])) > 1, 'all are treated alike'
  np.testing.assert_array_equal(sparse.stripes.grids, [[8, 8]])
  np.testing.assert_array_equal(sparse.regions.cuts, [[4, 4]])
  assert (
    render_report(ReportData('Trial', sparse=sparse)).count('<svg x=') == 12
  )


def test_nothing_is_computed_for_a_model_without_decisions(pictures):
  def of(embedder):
    shapes = jax.eval_shape(lambda: embedder.params)
    return look(dataclasses.replace(embedder, params=shapes), pictures, [1, 2])

  assert of(make(BackboneOnly(BACKBONE))) is None
  assert of(make(msba(BACKBONE, features=8, embedding=6, num_heads=2))) is None
  # Shapes are no parameters: what is computed with them fails.
  with pytest.raises(TypeError, match='ShapeDtypeStruct'):
    of(make_nexus())


def collect(embedder, pictures):
  vectors = np.random.default_rng(0).normal(size=(len(pictures), 4))
  vectors = vectors.astype(np.float32)
  return collect_report(
    embedder,
    Evaluation(pictures, None),
    RunInfo('Trial'),
    scores={},
    results={'solo': search(vectors, vectors, 5, exclude_self=True)},
  )


def test_report_has_the_section(make_pictures):
  data = collect(make(Known()), make_pictures(80))
  assert data.sparse.regions.shares.shape == (2, 64)
  assert len({picture.id for picture in data.sparse.pictures}) == 6
  page = render_report(data)
  assert '<a href="#sparse">' in page
  assert page.count('<section id="sparse">') == 1
  assert 'Of 64 images drawn at random, the 3 with the smallest' in page


def test_model_without_decisions_has_no_section(pictures):
  data = collect(make(BackboneOnly(BACKBONE)), pictures)
  assert data.sparse is None
  page = render_report(data)
  assert '#sparse' not in page
  assert 'id="sparse"' not in page


class Page(html.parser.HTMLParser):
  """All tags of a page with their attributes."""

  def __init__(self, text):
    super().__init__()
    self.tags = []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))


def test_section_runs_nothing_and_escapes_what_users_wrote(rng):
  sparse = make_sparse(rng, name=EVIL, label=EVIL)
  page = render_report(ReportData('Trial', sparse=sparse))
  parts = Page(page)
  assert not [tag for tag, _ in parts.tags if tag == 'script']
  ids = [attributes['id'] for _, attributes in parts.tags if 'id' in attributes]
  assert len(set(ids)) == len(ids)
  for tag, attributes in parts.tags:
    assert 'style' not in attributes, 'inline styles are blocked by the policy'
    for name, value in attributes.items():
      assert not name.startswith('on'), f'{tag} has a handler'
      if name in {'src', 'href', 'srcset'}:
        assert value.startswith(('data:', '#')), f'{tag} {name} {value[:40]}'
        assert value[0] != '#' or value[1:] in ids
  drawings = re.findall(r'(<svg [^>]*Where.*?</svg>)\s*<fig', page, re.DOTALL)
  assert len(drawings) == 6
  for drawing in drawings:
    root = ElementTree.fromstring(drawing)
    assert root.get('role') == 'img'
    assert EVIL in root.get('aria-label')
    images = [e for e in root.iter() if e.tag == 'image']
    assert len(images) == 1, 'a picture is carried once'
    paths = [e for e in root.iter() if e.tag == 'path']
    assert all(path.find('title').text for path in paths)


def test_pictures_take_their_share_of_the_budget(rng):
  def make_hit():
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    return Hit(Picture(image, 'hit'), 0.5, None)

  query = QueryResult(
    make_hit().picture, Answers(tuple(make_hit() for _ in range(8)))
  )
  data = ReportData('Trial', queries=(query,) * 30)
  shown = dataclasses.replace(data, sparse=make_sparse(rng, side=400))
  alone, beside = (
    [a['src'] for t, a in Page(render_report(d)).tags if t == 'img']
    for d in (data, shown)
  )
  assert sum(map(len, beside)) < 0.9 * sum(map(len, alone))
  carried = [
    a['href'] for t, a in Page(render_report(shown)).tags if t == 'image'
  ]
  assert len(carried) == 6
  # Noise takes some two bytes a pixel, and these are half as wide as high.
  assert max(map(len, carried)) < 2 * stripes.FACE_PIXELS**2


def test_images_that_are_treated_alike_are_not_set_apart(rng):
  sparse = make_sparse(rng)
  apart = stripes.layout(sparse)['choice']
  assert 'the 3 with the smallest and the 3 with the largest shares' in apart
  shares = np.full((2, 9), 0.5) + 1e-8 * rng.random((2, 9))
  alike = dataclasses.replace(sparse.regions, shares=shares)
  found = stripes.layout(dataclasses.replace(sparse, regions=alike))['choice']
  assert found.startswith('Shown are 6 of 9 images drawn at random.')
  assert found.endswith('the shares of kept pairs of regions are equal in all.')


@given(
  rows=st.integers(1, 9),
  columns=st.integers(1, 9),
  width=st.integers(1, 4),
  seed=st.integers(0, 99),
)
def test_cross_is_that_of_the_marked_token(rows, columns, width, seed):
  rng = np.random.default_rng(seed)
  count = rows * columns
  kept = (rng.random((1, 3, count, count)) < 0.2) | np.eye(count, dtype=bool)
  grid = np.array([[rows, columns]])
  sparse = SparseMap(
    (Picture(np.zeros((8, 8, 3), np.uint8), 'p'),),
    np.array([0]),
    Stripes(grid, np.array([[width]])),
    KeptRegions(grid, np.array([[kept.mean()]]), kept),
  )
  cross, heat = stripes.layout(sparse)['looks'][0]['panels']
  marks = paths_of(cross, 'marked')
  row, column = np.argwhere(cells_of(marks[0]['d'], rows, columns))[0]
  side = max(rows, columns)
  places = {
    'horizontal': lambda y, x: y // width,
    'vertical': lambda y, x: x // width,
    'diagonal': lambda y, x: (y - x) % side // width,
    'antidiagonal': lambda y, x: (y + x) % side // width,
  }
  ys, xs = np.mgrid[:rows, :columns]
  drawn = paths_of(cross, 'stripe')
  assert len(drawn) == len(DIRECTIONS)
  for number, (direction, path) in enumerate(
    zip(DIRECTIONS, drawn, strict=True)
  ):
    place = places[direction]
    expected = place(ys, xs) == place(row, column)
    np.testing.assert_array_equal(
      cells_of(path['d'], rows, columns), expected.astype(int)
    )
    assert path['kind'] == f'stripe series{number}'
    assert path['title'] == f'{direction} stripe of {expected.sum()} tokens'
  # One token a region: the frames are the row of the marked token.
  frames = cells_of(paths_of(heat, 'kept')[0]['d'], rows, columns)
  np.testing.assert_array_equal(
    frames.ravel(), kept[0, :, row * columns + column].any(axis=0).astype(int)
  )


def test_directions_without_heads_are_not_drawn(make_pictures):
  sparse = look(make(Known()), make_pictures(6), np.arange(6))
  assert sparse.stripes.directions == ('horizontal', 'vertical', 'antidiagonal')
  variables = stripes.layout(sparse)
  assert variables['directions'] == [
    {'name': 'horizontal', 'series': 0},
    {'name': 'vertical', 'series': 1},
    {'name': 'antidiagonal', 'series': 3},
  ]
  drawn = paths_of(variables['looks'][0]['panels'][0], 'stripe')
  assert [x['kind'] for x in drawn] == [f'stripe series{i}' for i in (0, 1, 3)]


def test_marked_region_is_the_one_that_most_others_keep(rng):
  for _ in range(20):
    finest = (rng.random((6, 2, 12, 12)) < 0.3) | np.eye(12, dtype=bool)
    sparse = dataclasses.replace(
      make_sparse(rng),
      regions=KeptRegions(np.array([[4, 3]] * 2), rng.random((2, 9)), finest),
      stripes=None,
    )
    for shown, kept in zip(
      stripes.layout(sparse)['looks'], finest, strict=True
    ):
      mark = paths_of(shown['panels'][0], 'marked')[0]['d']
      marked = int(cells_of(mark, 4, 3).ravel().argmax())
      others = kept.sum(axis=(0, 1))
      assert others[marked] == others.max()
      some = kept[0] | kept[1]
      assert (
        f'In some head the marked region keeps {some[marked].sum()} of 12 and '
        f'is kept by {some[:, marked].sum() - 1} of the 11 others.'
      ) in shown['sentences']


def test_of_equal_regions_the_central_one_is_marked(rng):
  finest = np.ones((6, 1, 9, 9), bool)
  regions = KeptRegions(np.array([[3, 3]] * 2), rng.random((2, 9)), finest)
  grids = np.array([[12, 6], [3, 3]])
  widths = np.full((2, 9), 2)
  sparse = dataclasses.replace(
    make_sparse(rng), stripes=Stripes(grids, widths), regions=regions
  )
  cross, heat = stripes.layout(sparse)['looks'][0]['panels']
  assert paths_of(heat, 'marked')[0]['d'] == 'M1 1h1v1h-1z'
  # Its token is the one below and to the right of its middle.
  assert paths_of(cross, 'marked')[0]['d'] == 'M3 6h1v1h-1z'


def test_colour_counts_the_regions_that_keep_a_region(rng):
  sparse = make_sparse(rng)
  finest = sparse.regions.finest
  high = finest.mean(axis=(1, 2)).max()
  shown = stripes.layout(sparse)
  for look_, kept in zip(shown['looks'], finest, strict=True):
    found, covered = np.zeros((3, 2)), np.zeros((3, 2), int)
    for path in paths_of(look_['panels'][1], 'heat'):
      cells = cells_of(path['d'], 3, 2)
      covered += cells
      found += float(path['opacity']) * cells
    np.testing.assert_array_equal(covered, np.ones((3, 2), int))
    np.testing.assert_allclose(
      found, kept.mean(axis=(0, 1)).reshape(3, 2) / high, atol=6e-4
    )
  assert shown['high'] == f'{100 * high:.1f}\xa0%'


def test_panels_lie_beside_each_other_in_the_shape_of_the_picture(rng):
  for parts in (BOTH, BOTH[:1], BOTH[1:]):
    for shown in stripes.layout(make_sparse(rng, parts=parts))['looks']:
      assert shown['height'] == 2 * shown['width']
      starts = [0, *(panel['x'] for panel in shown['panels'])]
      assert len(starts) == len(parts) + 1
      for left, right in itertools.pairwise(starts):
        assert right - left > shown['width']
      assert shown['box'] == (
        f'0 0 {starts[-1] + shown["width"]} {shown["height"]}'
      )


def test_numbers_of_every_level_are_told(rng):
  sparse = make_sparse(rng)
  for i, shown in enumerate(stripes.layout(sparse)['looks']):
    widths, shares = shown['rows']
    assert widths['values'] == [str(w) for w in sparse.stripes.widths[:, i]]
    assert shares['values'] == [
      f'{100 * s:.1f}\xa0%' for s in sparse.regions.shares[:, i]
    ]
    assert shown['levels'] == ['6 × 4 tokens', '3 × 2 tokens']
    assert shown['alt'].startswith(f'Where the model looks in p{i} (ant). ')


def test_summary_has_means_and_deviations(rng):
  sparse = SparseMap(
    make_sparse(rng).pictures[:2],
    np.array([0, 1]),
    Stripes(np.array([[6, 4], [3, 2]]), np.array([[2, 4], [1, 1]])),
    KeptRegions(
      np.array([[3, 2], [1, 1]]),
      np.array([[0.25, 0.75], [1.0, 1.0]]),
      np.ones((2, 1, 6, 6), bool),
    ),
  )
  assert stripes.summary(sparse) == (
    'Over 2 images (mean ± standard deviation) level 1 keeps 50.0\xa0% ± 25.0 '
    'of all pairs of regions and has stripes of 3.0 ± 1.0 tokens; level 2 '
    'keeps 100.0\xa0% ± 0.0 of all pairs of regions and has stripes of '
    '1.0 ± 0.0 tokens.'
  )


def test_decisions_must_fit_their_pictures(rng, unchecked):
  sparse = make_sparse(rng)
  for changes, message in (
    ({'shown': np.arange(5)}, 'does not fit 6 pictures'),
    (
      {
        'regions': dataclasses.replace(
          sparse.regions, finest=sparse.regions.finest[:2]
        )
      },
      'does not fit 6 pictures',
    ),
    ({'stripes': None, 'regions': None}, 'neither stripes nor regions'),
  ):
    with pytest.raises(ValueError, match=message):
      stripes.layout(dataclasses.replace(sparse, **changes))
