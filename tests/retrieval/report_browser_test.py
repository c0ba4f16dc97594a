"""The page in headless Chromium: it loads whole, fits, and is not blank."""

import html
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from msba_jax.retrieval.report import page
from msba_jax.retrieval.report.data import (
  Answers,
  AttentionMap,
  ClassRecall,
  Curve,
  CurvePanel,
  Estimate,
  Hit,
  Mode,
  Picture,
  QueryResult,
  ReportData,
)

BROWSER = next(
  filter(
    None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))
  ),
  None,
)
FLAGS = (
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--hide-scrollbars',
  '--enable-logging=stderr',
)
# Runs in a copy of the page that lacks the policy, which allows no script. The
# copy lies in a frame: a window of Chromium is never as narrow as a phone.
PROBE = """<script>
addEventListener('load', () => {
  const images = [...document.images];
  const faces = [...document.querySelectorAll('use')].map(
    face => face.getBoundingClientRect().width);
  const root = document.documentElement;
  const found = top.document.documentElement.dataset;
  found.images = images.length;
  found.broken = images.filter(image => !image.naturalWidth).length;
  found.faces = faces.filter(width => width > 0).length;
  found.overflow = root.scrollWidth - innerWidth;
  found.width = innerWidth;
});
</script>"""
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')

pytestmark = pytest.mark.skipif(
  BROWSER is None, reason='no Chromium is installed: apt install chromium'
)


def make_data():
  rng = np.random.default_rng(0)

  def make_picture(index):
    image = np.zeros((48, 48, 3), np.uint8)
    image[:] = rng.integers(0, 256, 3)
    image[12:36, 12:36] = rng.integers(0, 256, 3)
    return Picture(image, f'photographs/of/class/{index:012d}.jpg', 'a class')

  def make_answers():
    hits = tuple(Hit(make_picture(i), 0.5, i % 2 == 0) for i in range(8))
    return Answers(hits, 0.3, 1)

  results = tuple(
    QueryResult(make_picture(i), make_answers(), make_answers())
    for i in range(2)
  )
  weights = rng.dirichlet(np.ones(24), 24)
  metrics = {
    name: Estimate(0.4, 0.3, 0.5)
    for name in ('Recall@1', 'Recall@2', 'Recall@4', 'Recall@8', 'mAP', 'MAP@R')
  }
  curve = Curve('loss', np.arange(1, 100), np.linspace(2.0, 1.0, 99))
  return ReportData(
    'A title that is long and has_no_place_where_it_could_be_broken_in_two',
    modes=(Mode('solo', 'by itself', metrics), Mode('neighbours', '', metrics)),
    after='neighbours',
    queries=results,
    hardest=results,
    attention=AttentionMap(tuple(map(make_picture, range(24))), weights),
    classes=tuple(ClassRecall(f'class {i}', 9, i / 9, 0.5) for i in range(8)),
    panels=(CurvePanel('Loss', (curve,), smooth=True),),
    configuration=(('data.path', 'a/path/without/an/end/' * 9),),
    environment=(('fingerprint', '0123456789abcdef' * 4),),
    command='msba report ' + 'runs/of/a/long/name' * 9,
  )


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  path = tmp_path_factory.mktemp('page') / 'report.html'
  page.write_report(path, make_data())
  return path


def browse(path, folder, *arguments, width, height, dark=False):
  """Opens a page; returns what the browser printed."""
  done = subprocess.run(
    [
      BROWSER,
      *FLAGS,
      f'--user-data-dir={folder / "profile"}',
      f'--blink-settings=preferredColorScheme={0 if dark else 1}',
      f'--window-size={width},{height}',
      *arguments,
      path.as_uri(),
    ],
    capture_output=True,
    text=True,
    timeout=180,
    check=True,
  )
  # What the page itself complains about, such as what its policy blocks.
  assert 'CONSOLE' not in done.stderr, done.stderr
  return done.stdout


@pytest.mark.parametrize('width', [1280, 400])
def test_everything_loads_and_fits(report, tmp_path, width):
  text, removed = POLICY.subn('', report.read_text())
  assert removed == 1
  probed = html.escape(text.replace('</body>', f'{PROBE}</body>'))
  outer = tmp_path / 'outer.html'
  outer.write_text(
    f'<!DOCTYPE html><meta charset="utf-8">'
    f'<iframe width="{width}" height="900" srcdoc="{probed}"></iframe>'
  )
  dom = browse(outer, tmp_path, '--dump-dom', width=1400, height=1000)
  found = {k: int(v) for k, v in re.findall(r'data-(\w+)="(-?\d+)"', dom[:500])}
  assert found['width'] == width
  assert found['images'] == text.count('<img ') == 70
  assert found['broken'] == 0
  assert found['faces'] == 48
  assert found['overflow'] <= 0


@pytest.mark.parametrize(
  ('width', 'height', 'dark'), [(1280, 1500, False), (400, 2600, True)]
)
def test_screen_is_not_blank(report, tmp_path, width, height, dark):
  shot = tmp_path / 'shot.png'
  arguments = f'--screenshot={shot}'
  browse(report, tmp_path, arguments, width=width, height=height, dark=dark)
  with Image.open(shot) as picture:
    assert picture.size == (width, height)
    pixels = np.asarray(picture.convert('RGB'))
  assert len(np.unique(pixels.astype(np.int32) @ (65536, 256, 1))) > 300
  background = np.median(pixels.reshape(-1, 3), axis=0)
  assert (background < 60).all() if dark else (background > 200).all()
  # Frames of right and wrong results, in the colours of the scheme.
  right, wrong = (
    ((63, 185, 80), (255, 107, 99)) if dark else ((26, 127, 55), (201, 37, 45))
  )
  for colour in (right, wrong):
    assert (pixels == colour).all(axis=-1).sum() > 500
