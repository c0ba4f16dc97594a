"""Tests of the page, its pictures and charts, outside a browser."""

import base64
import dataclasses
import hashlib
import html
import html.parser
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from msba_jax.data.errors import InputError
from msba_jax.retrieval.report import charts, figures, matrix
from msba_jax.retrieval.report.curves import curve_panels
from msba_jax.retrieval.report.data import (
  Answers,
  AttentionMap,
  ClassRecall,
  Estimate,
  Hit,
  Mode,
  Picture,
  QueryResult,
  ReportData,
)
from msba_jax.retrieval.report.page import render_report, write_report
from msba_jax.retrieval.report.picture import results_picture, thumbnail

EVIL = '<script>alert(1)</script>"\'&'


def make_picture(rng, *, side=32, name='a', label='ant'):
  image = rng.integers(0, 256, (side, side, 3), np.uint8)
  return Picture(image, name, label)


def make_answers(rng, *, hits=8, side=32, label='ant'):
  return Answers(
    tuple(
      Hit(
        make_picture(rng, side=side, name=f'hit{i}', label=label),
        0.9 - 0.05 * i,
        (True, False, None)[i % 3],
      )
      for i in range(hits)
    ),
    0.25,
    1,
  )


def make_attention(rng, *, classes=3, images=2, side=32):
  pictures = tuple(
    make_picture(rng, side=side, name=f'{c}/{i}', label=f'class{c}')
    for c in range(classes)
    for i in range(images)
  )
  weights = rng.random((len(pictures), len(pictures)))
  return AttentionMap(pictures, weights / weights.sum(axis=1, keepdims=True))


def make_data(rng, *, queries=2, side=32, label='ant'):
  def make_results(count, hits):
    return tuple(
      QueryResult(
        make_picture(rng, side=side, name=f'query{i}', label=label),
        make_answers(rng, hits=hits, side=side, label=label),
        make_answers(rng, hits=hits, side=side, label=label),
      )
      for i in range(count)
    )

  rows = [
    {'step': s, 'phase': 'train', 'loss': 5 / s, 'learning_rate': 1e-3}
    for s in range(1, 60)
  ]
  rows += [
    {'step': s, 'phase': 'validation', 'recall@1': s / 99} for s in (20, 40)
  ]
  estimate = Estimate(0.5, 0.45, 0.55)
  return ReportData(
    title='Trial',
    description='A trial.',
    facts=(('Queries', '12'),),
    modes=(
      Mode('solo', 'each by itself', {'Recall@1': estimate, 'mAP': estimate}),
      Mode('neighbours', '', {'Recall@1': estimate}, {'Recall@1': estimate}),
    ),
    interval='Intervals are made up.',
    after='neighbours',
    queries=make_results(queries, 8),
    hardest=make_results(queries, 4),
    attention=make_attention(rng, side=side),
    classes=tuple(ClassRecall(f'class{i}', 9, i / 30, 0.5) for i in range(30)),
    panels=curve_panels(rows),
    configuration=(('steps', '59'),),
    environment=(('jax', '0.10.2'),),
    command='msba report runs/trial',
  )


@pytest.fixture(scope='module')
def text():
  """A page with everything."""
  return render_report(make_data(np.random.default_rng(0)))


class Page(html.parser.HTMLParser):
  """All tags of a page with their attributes."""

  def __init__(self, text):
    super().__init__()
    self.tags = []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def all(self, name):
    return [attributes for tag, attributes in self.tags if tag == name]


def test_page_shows_everything(text):
  for part in (
    'Recall@1',
    '95 % interval 45.0 – 55.0',
    '+50.0 points on solo (+45.0 to +55.0)',
    'AP 25.0\xa0% · first right at 1',
    'Attention of 6 images',
    'class29',
    'Learning rate',
    'Validation: Recall@1',
    'msba report runs/trial',
  ):
    assert part in text, part
  assert 'class="absent"' not in text
  assert text.count('aria-hidden="true">✓</span>') == 20
  assert text.count('aria-hidden="true">✗</span>') == 16


def test_page_loads_nothing_and_runs_nothing(text):
  page = Page(text)
  assert not page.all('script')
  assert not page.all('iframe')
  for tag, attributes in page.tags:
    assert 'style' not in attributes, 'inline styles are blocked by the policy'
    for name, value in attributes.items():
      assert not name.startswith('on'), f'{tag} has a handler'
      if name in {'src', 'href', 'srcset', 'action', 'data'}:
        assert value.startswith(('data:', '#')), f'{tag} {name} {value[:40]}'


def test_policy_names_the_style_sheet_that_is_there(text):
  policy = next(
    m['content'] for m in Page(text).all('meta') if 'http-equiv' in m
  )
  style = re.search(r'<style>(.*?)</style>', text, re.DOTALL)[1]
  digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
  assert "default-src 'none'" in policy
  assert f"style-src 'sha256-{digest}'" in policy
  assert '@import' not in style
  assert 'url(' not in style


def test_every_picture_is_described(text):
  page = Page(text)
  alts = [attributes['alt'] for attributes in page.all('img')]
  assert len(alts) > 50
  assert all(alts)
  assert 'Result 2, wrong: hit1, class ant' in alts
  assert 'Query query0, class ant' in alts


def test_what_users_wrote_is_escaped(rng):
  data = make_data(rng, label=EVIL)
  picture = make_picture(rng, name=EVIL, label=EVIL)
  data = dataclasses.replace(
    data,
    title=EVIL,
    description=EVIL,
    facts=((EVIL, EVIL),),
    modes=(Mode(EVIL, EVIL, {EVIL: Estimate(0.5)}),),
    before=EVIL,
    after=EVIL,
    queries=(QueryResult(picture, make_answers(rng, label=EVIL)),),
    hardest=(),
    panels=(),
    attention=AttentionMap((picture, picture), np.full((2, 2), 0.5)),
    classes=(ClassRecall(EVIL, 3, 0.5),),
    configuration=((EVIL, EVIL),),
    environment=((EVIL, EVIL),),
    command=EVIL,
  )
  text = render_report(data)
  assert '<script' not in text
  assert html.escape(EVIL, quote=False).replace('"', '&#34;')[:20] in text
  page = Page(text)
  assert not page.all('script')
  alts = [attributes['alt'] for attributes in page.all('img')]
  assert f'Query {EVIL}, class {EVIL}' in alts
  for picture in page.all('img'):
    if picture['src'].startswith('data:image/svg+xml'):
      content = base64.b64decode(picture['src'].partition(',')[2])
      root = ElementTree.fromstring(content)
      assert not [e for e in root.iter() if e.tag.endswith('script')]


@pytest.mark.parametrize(
  'sentence',
  [
    'No metrics were computed',
    'No results were kept',
    'the hardest queries are not known',
    'there is no attention to show',
    'Recall was not computed class by class',
    'There are no training curves',
    'The configuration is not known',
    'The environment is not known',
    'The command that made this report is not known',
  ],
)
def test_what_is_missing_is_said(text, sentence):
  empty = render_report(ReportData('Trial'))
  assert empty.count('class="absent"') == 9
  assert sentence in empty
  assert sentence not in text


def test_without_reranking_one_list_stands_alone(rng):
  data = make_data(rng)
  data = dataclasses.replace(
    data,
    after=None,
    queries=tuple(dataclasses.replace(q, after=None) for q in data.queries),
    hardest=(),
    classes=tuple(ClassRecall(c, 4, 0.5) for c in 'ab'),
    panels=(),
  )
  text = render_report(data)
  assert 'Results were not re-ranked' in text
  assert 'query pair' not in text
  assert 'change</th>' not in text


def test_page_of_default_size_stays_small(rng):
  """Noise is the worst case of a JPEG; these sources are large as well."""
  data = make_data(rng, queries=6, side=160)
  attention = make_attention(rng, classes=6, images=4, side=160)
  text = render_report(dataclasses.replace(data, attention=attention))
  assert len(text) < 5e6


def test_more_queries_take_no_more_room(rng):
  few, many = (
    sum(len(image['src']) for image in Page(render_report(data)).all('img'))
    for data in (
      dataclasses.replace(
        make_data(rng, queries=number, side=64), panels=(), classes=()
      )
      for number in (10, 20)
    )
  )
  assert many < 1.3 * few


def test_report_is_written_as_a_whole(rng, tmp_path, monkeypatch):
  path = tmp_path / 'new' / 'report.html'
  write_report(path, ReportData('first'))
  assert 'first' in path.read_text()

  def interrupt(_):
    raise KeyboardInterrupt

  monkeypatch.setattr('os.fsync', interrupt)
  with pytest.raises(KeyboardInterrupt):
    write_report(path, ReportData('second'))
  assert '<title>first</title>' in path.read_text()
  assert [p.name for p in path.parent.iterdir()] == ['report.html']


def test_report_needs_a_file_to_write_to(tmp_path):
  with pytest.raises(InputError, match='is a directory: name a file'):
    write_report(tmp_path, ReportData('a'))
  (tmp_path / 'file').touch()
  with pytest.raises(InputError, match='is no directory: name another file'):
    write_report(tmp_path / 'file' / 'report.html', ReportData('a'))


def test_thumbnails_shrink_and_never_grow(rng):
  image = rng.integers(0, 256, (40, 20, 3), np.uint8)
  for side, size in ((20, (10, 20)), (96, (20, 40))):
    content = base64.b64decode(thumbnail(image, side).partition(',')[2])
    with Image.open(io.BytesIO(content)) as picture:
      assert picture.size == size


def test_attention_opacity_follows_the_weights(rng):
  attention = make_attention(rng)
  count = len(attention.pictures)
  cells = matrix.layout(attention)['cells']
  opacity = np.array([float(c['opacity']) for c in cells]).reshape(count, count)
  others = attention.weights[~np.eye(count, dtype=bool)].max()
  expected = np.minimum(attention.weights / others, 1)
  np.testing.assert_allclose(opacity, expected, atol=6e-4)
  # Rows of cells stand below each other, columns beside each other.
  assert cells[1]['x'] > cells[0]['x']
  assert cells[count]['y'] > cells[0]['y']


def test_attention_summary_counts_oneself_apart(rng):
  attention = make_attention(rng, classes=2, images=2)
  weights = np.array(
    [
      [0.5, 0.3, 0.1, 0.1],
      [0.2, 0.6, 0.2, 0.0],
      [0.1, 0.1, 0.4, 0.4],
      [0.0, 0.0, 0.3, 0.7],
    ]
  )
  text = matrix.summary(AttentionMap(attention.pictures, weights))
  assert '55.0\xa0% from itself' in text
  assert '30.0\xa0% from the other images of its class' in text
  assert text.endswith('25.0\xa0% and 25.0\xa0%.')


def test_attention_must_fit_its_pictures(rng):
  pictures = make_attention(rng).pictures
  with pytest.raises(ValueError, match='does not fit 6 pictures'):
    matrix.layout(AttentionMap(pictures, np.ones((5, 5))))


def test_running_mean_equals_a_loop(rng):
  values = rng.normal(size=100)
  expected = [values[max(i - 2, 0) : i + 3].mean() for i in range(100)]
  np.testing.assert_allclose(figures.running_mean(values), expected)


def test_curves_are_sorted_into_panels():
  rows = [
    {'step': 4, 'phase': 'train', 'pairs': 1.0, 'loss': 2.0, 'data_wait': 0.1},
    {'step': 2, 'phase': 'train', 'pairs': 3.0, 'loss': 4.0},
    {'step': 4, 'phase': 'validation', 'solo/ap': 0.1, 'neighbours/ap': 0.2},
  ]
  loss, precision = curve_panels(rows)
  assert [curve.name for curve in loss.curves] == ['loss', 'pairs']
  np.testing.assert_array_equal(loss.curves[0].steps, [2, 4])
  np.testing.assert_array_equal(loss.curves[0].values, [4.0, 2.0])
  assert precision.title == 'Validation: mAP'
  assert [curve.name for curve in precision.curves] == ['solo', 'neighbours']
  assert curve_panels([]) == ()


def test_charts_are_the_same_every_time_and_say_what_they_show(rng):
  panel = curve_panels(
    [{'step': s, 'loss': np.nan if s == 3 else 9.0 - s} for s in range(1, 8)]
  )[0]
  light = figures.curve_chart(panel, figures.LIGHT)
  assert light == figures.curve_chart(panel, figures.LIGHT)
  assert light != figures.curve_chart(panel, figures.DARK)
  assert ElementTree.fromstring(light).tag.endswith('svg')
  assert charts.panel(panel)['alt'] == 'Loss over 7 steps: loss from 8 to 2'


def test_charts_survive_any_class_name(rng):
  names = ('$x$', '鳥', 'a' * 60, '\\frac{')
  recalls = [ClassRecall(name, 1, 0.5) for name in names]
  content = figures.recall_chart(
    recalls, figures.LIGHT, before='$solo', after=None
  ).decode()
  assert '鳥' in content
  assert '$x$' in content
  assert '$solo' in content
  ElementTree.fromstring(content)


def test_only_the_ends_of_many_classes_are_drawn(rng):
  recalls = tuple(ClassRecall(f'c{i}', 1, i / 700) for i in range(700))
  shown = charts.classes(ReportData('a', classes=recalls))
  assert len(shown['charts']) == 2
  assert shown['left_out']
  assert len(shown['rows']) == 500
  assert shown['rows'][-1]['name'] == 'c0'
  assert 'c699' in shown['charts'][0]['alt']


def count_colour(path, colour):
  with Image.open(path) as picture:
    pixels = np.asarray(picture.convert('RGB')).reshape(-1, 3).astype(int)
  return int((np.abs(pixels - colour).max(axis=1) < 4).sum())


def test_results_picture_frames_right_and_wrong(rng, tmp_path):
  path = tmp_path / 'results.png'
  query = np.full((16, 16, 3), 255, np.uint8)
  results = [np.full((8 + i, 12, 3), 255, np.uint8) for i in range(4)]
  scores = np.linspace(0.9, 0.1, 4)
  ids = ['$a$'] * 3 + ['long/' * 20]
  green, red = (0x1A, 0x7F, 0x37), (0xC9, 0x25, 0x2D)
  counts = {}
  for name, correct in (
    ('right', [True] * 4),
    ('wrong', [False] * 4),
    ('unknown', None),
  ):
    results_picture(query, results, correct, scores, path, ids=ids)
    counts[name] = count_colour(path, green), count_colour(path, red)
  assert counts['right'][0] > 1000
  assert counts['right'][1] == 0
  assert counts['wrong'][1] > 1000
  assert counts['wrong'][0] == 0
  assert counts['unknown'] == (0, 0)
  with Image.open(path) as picture:
    assert picture.width > picture.height > 300


def test_results_picture_wants_one_score_per_result(tmp_path):
  image = np.zeros((4, 4, 3), np.uint8)
  with pytest.raises(ValueError, match=r'equally many, got \(1, 2, 1, 1\)'):
    results_picture(image, [image], None, [0.1, 0.2], tmp_path / 'a', ids=['a'])
