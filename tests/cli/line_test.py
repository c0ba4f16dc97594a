"""The commands one after the other: train, evaluate, index, search, report."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msba_jax import cli
from msba_jax.cli import demo
from msba_jax.data.corruptions import CORRUPTIONS
from msba_jax.retrieval.index import open_index
from msba_jax.training.load import load_experiment

EXPERIMENT = Path(__file__).parents[1] / 'training' / 'small_experiment.py'
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """A directory with a trained run and two indices."""
  home = tmp_path_factory.mktemp('line')
  runs = ['--runs-dir', str(home / 'runs')]
  assert cli.main(['train', str(EXPERIMENT), *runs, '--steps', '4']) == 0
  run = str(home / 'runs' / 'small' / 'seed0')
  index = ['index', run, 'test', str(home / 'test.index'), '--regions']
  assert cli.main(index) == 0
  return home


@pytest.fixture
def run(home):
  return str(home / 'runs' / 'small' / 'seed0')


@pytest.fixture
def photo(home):
  """One image of the test split, in a file of its own."""
  image = load_experiment(EXPERIMENT).data.open().test.queries[5]['image']
  path = home / 'photo.png'
  Image.fromarray(image).save(path)
  return str(path)


def test_training_again_leaves_the_run_as_it_is(home, run, capsys):
  weights = Path(run) / 'weights' / 'manifest.json'
  before = weights.stat().st_mtime_ns
  arguments = ['train', str(EXPERIMENT), '--runs-dir', str(home / 'runs')]
  assert cli.main([*arguments, '--steps', '4']) == 0
  assert weights.stat().st_mtime_ns == before
  assert f'msba evaluate {run}' in capsys.readouterr().out
  assert cli.main([*arguments, '--steps', '5']) == 2
  assert 'another configuration' in capsys.readouterr().err


def test_overrides_are_refused_in_one_sentence(home, capsys):
  for words in (['--stpes', '3'], ['--steps', 'many'], ['--steps', '2']):
    assert cli.main(['train', str(EXPERIMENT), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert 'steps' in error or 'stpes' in error
    assert len(error.splitlines()) == 1


def test_fields_are_listed(capsys):
  assert cli.main(['train', str(EXPERIMENT), '--fields']) == 0
  assert '--optimizer.learning-rate' in capsys.readouterr().out


def test_evaluate_prints_a_table(run, capsys):
  assert cli.main(['evaluate', run, '--split', 'test']) == 0
  text = capsys.readouterr().out
  noted = json.loads((Path(run) / 'evaluation.json').read_text())['test']
  for mode in ('solo', 'neighbours', 'memory', 'refinement'):
    line = re.search(rf'^{mode} .*$', text, re.MULTILINE).group()
    recall = 100 * noted['scores'][mode]['recall@1']
    assert f'{recall:.2f}' in line
  assert 'test: 48 queries, 6 classes' in text


def test_evaluate_damages_images(run, capsys):
  path = Path(run) / 'evaluation.json'
  arguments = ['evaluate', run, '--split', 'test', '--modes', 'solo']
  assert cli.main(arguments) == 0
  sound = json.loads(path.read_text())['test']
  capsys.readouterr()
  damage = ['--corruption', 'gaussian_noise', '--severity', '5']
  assert cli.main([*arguments, *damage]) == 0
  text = capsys.readouterr().out
  assert 'test, gaussian_noise of severity 5: 48 queries, 6 classes' in text
  noted = json.loads(path.read_text())
  assert noted['test'] == sound
  damaged = noted['test-gaussian_noise-5']
  assert damaged['scores'] != sound['scores']
  recall = 100 * damaged['scores']['solo']['recall@1']
  assert f'{recall:.2f}' in re.search(r'^solo .*$', text, re.MULTILINE).group()


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (
      ['--corruption', 'fog', '--severity', '1'],
      f'--corruption fog is none of {", ".join(CORRUPTIONS)}',
    ),
    (
      ['--corruption', 'occlusion', '--severity', '6'],
      '--severity 6 is none of 1, 2, 3, 4, 5',
    ),
    (['--corruption', 'occlusion'], 'occlusion needs a --severity'),
    (['--severity', '3'], '--severity 3 needs a --corruption'),
  ],
)
@pytest.mark.parametrize('command', ['evaluate', 'compare'])
def test_damage_is_chosen_in_full(
  run, tmp_path, monkeypatch, capsys, command, flags, said
):
  monkeypatch.chdir(tmp_path)
  what = run if command == 'evaluate' else str(EXPERIMENT)
  assert cli.main([command, what, *flags]) == 2
  error = capsys.readouterr().err.strip()
  assert said in error
  assert len(error.splitlines()) == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('command', ['evaluate', 'compare'])
def test_help_names_every_corruption(capsys, command):
  assert cli.main([command, '--help']) == 0
  text = capsys.readouterr().out
  assert all(name in text for name in CORRUPTIONS)


@pytest.mark.parametrize('mode', ['solo', 'neighbours'])
def test_search_finds_the_image_itself(home, run, photo, capsys, mode):
  picture = home / f'{mode}.png'
  arguments = ['search', photo, '--index', str(home / 'test.index')]
  arguments += ['--run', run, '--mode', mode, '-k', '3']
  assert cli.main([*arguments, '--picture', str(picture)]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 4
  ranks, scores, ids = zip(
    *(line.split()[:3] for line in lines[:3]), strict=True
  )
  assert ranks == ('1', '2', '3')
  assert sorted(map(float, scores), reverse=True) == list(map(float, scores))
  if mode == 'solo':
    assert ids[0] == '2/5'
    assert float(scores[0]) == pytest.approx(1, abs=1e-4)
  with Image.open(picture) as drawn:
    assert drawn.format == 'PNG'


def test_a_folder_of_any_shape_becomes_an_index(home, run, photo, capsys, rng):
  folder = home / 'photos'
  for name in ('a/1.png', 'a/deep/2.png', 'b/3.jpg'):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
  out = home / 'photos.index'
  assert cli.main(['index', run, str(folder), str(out)]) == 0
  assert 'Bytes per image' in capsys.readouterr().out
  index = open_index(out)
  assert sorted(index.ids) == ['a/1.png', 'a/deep/2.png', 'b/3.jpg']
  assert index.class_names == ('a', 'a/deep', 'b')
  search = ['search', photo, '--index', str(out), '--run', run]
  assert cli.main([*search, '--mode', 'neighbours']) == 2
  assert 'stores no regions' in capsys.readouterr().err
  assert cli.main([*search, '-k', '0']) == 2
  assert '-k 0 must be at least 1' in capsys.readouterr().err
  (folder / 'b' / '4.jpg').write_bytes(b'no image')
  before = index.fingerprint, (out / 'manifest.json').read_bytes()
  assert cli.main(['index', run, str(folder), str(out)]) == 2
  assert '4.jpg' in capsys.readouterr().err
  assert before == (index.fingerprint, (out / 'manifest.json').read_bytes())


def test_what_does_not_fit_is_said(home, run, photo, capsys):
  (home / 'empty').mkdir(exist_ok=True)
  for arguments, said in (
    (['index', run, str(home / 'empty'), str(home / 'x')], 'holds no image'),
    (['index', run, str(home / 'none'), str(home / 'x')], 'does not exist'),
    (['search', photo, '--index', run, '--run', run], 'is no index'),
    (
      ['search', 'no.png', '--index', str(home / 'test.index'), '--run', run],
      'no.png cannot be read',
    ),
  ):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
  assert not (home / 'x').exists()


def test_report_is_one_page(run, capsys):
  assert cli.main(['report', run, '--split', 'test']) == 0
  page = Path(run) / 'report-test.html'
  assert str(page) in capsys.readouterr().out
  text = page.read_text()
  assert 'small on test classes' in text
  assert 'data:image/' in text
  assert 'optimizer.learning_rate' in text


def test_compare_skips_what_stands(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  second = tmp_path / 'second.py'
  second.write_text(
    EXPERIMENT.read_text().replace("name='small'", "name='second'")
  )
  arguments = ['compare', str(EXPERIMENT), str(second), '--seeds', '0']
  arguments += ['--steps', '3', '--memory-size', '0', '--markdown', 'table.md']
  assert cli.main(arguments) == 0
  first = capsys.readouterr().out
  files = sorted(Path('results').rglob('*.json'))
  assert len(files) == 2
  stamps = [file.stat().st_mtime_ns for file in files]
  table = Path('table.md').read_text()
  assert table in first
  assert '| small | solo |' in table
  assert '| second | neighbours |' in table
  files[0].unlink()
  assert cli.main(arguments) == 0
  text = capsys.readouterr().out
  assert text.count('stands in results') == 1
  assert text.count('training and scoring') == 1
  assert Path('table.md').read_text() == table
  assert [f.stat().st_mtime_ns for f in files[1:]] == stamps[1:]
  assert Path('table.md').read_text().startswith('validation\n\n| recall@1')
  damage = ['--corruption', 'contrast', '--severity', '2']
  assert cli.main([*arguments, *damage]) == 0
  title = 'validation, contrast of severity 2\n\n| recall@1'
  assert Path('table.md').read_text().startswith(title)
  assert len(list(Path('results').rglob('validation-contrast-2-*.json'))) == 2
  assert len(list(Path('results').rglob('*.json'))) == 4
  assert cli.main(['compare', str(EXPERIMENT), str(EXPERIMENT)]) == 2
  assert "both named 'small'" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_with_code_3(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv('SMALL_TRAP', '7')
  arguments = ['train', str(EXPERIMENT), '--runs-dir', str(tmp_path)]
  assert cli.main([*arguments, '--steps', '40']) == 3
  error = capsys.readouterr().err
  last = error.strip().splitlines()[-1]
  assert last.startswith('msba train: step ')
  assert re.search(r'\[[\d, ]*\b7\b[\d, ]*\]', last)
  assert '0/7' in last


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_says_how_to_go_on(tmp_path, number):
  # A suite that runs in the background hands down an ignored SIGINT.
  code = (
    'import signal, sys; from msba_jax.cli import main; '
    'signal.signal(signal.SIGINT, signal.default_int_handler); '
    'sys.exit(main(sys.argv[1:]))'
  )
  command = [sys.executable, '-c', code, 'train', str(EXPERIMENT)]
  command += ['--runs-dir', str(tmp_path), '--steps', '100000']
  command += ['--checkpoint-every', '100000', '--log-every', '1']
  process = subprocess.Popen(
    command,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'XLA_FLAGS': ''},
  )
  log = tmp_path / 'small' / 'seed0' / 'metrics.jsonl'
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and process.poll() is None:
    if log.exists() and log.stat().st_size:
      break
    time.sleep(0.1)
  process.send_signal(number)
  try:
    _, error = process.communicate(timeout=240)
  finally:
    process.kill()
  assert process.returncode == 130, error
  last = error.strip().splitlines()[-1]
  assert last.startswith('msba train: ')
  assert 'the same command' in last


def test_the_demo_is_reused(tmp_path, monkeypatch, capsys):
  whole = load_experiment(demo.EXPERIMENT)
  few = dataclasses.replace(
    load_experiment(EXPERIMENT),
    data=dataclasses.replace(
      whole.data,
      size=32,
      train_classes=6,
      validation_classes=3,
      test_classes=3,
      train_scenes=24,
      validation_scenes=12,
      test_scenes=12,
      data_dir=str(tmp_path / 'data'),
    ),
    steps=3,
  )
  monkeypatch.setattr('msba_jax.training.load.load_experiment', lambda *_: few)
  assert cli.main(['demo', '--directory', str(tmp_path)]) == 0
  assert str(tmp_path / 'report.html') in capsys.readouterr().out
  outputs = ['report.html', 'search.png', 'query.png', 'index/manifest.json']
  outputs += ['run/weights/manifest.json', 'run/evaluation.json']
  stamps = [(tmp_path / name).stat().st_mtime_ns for name in outputs]
  started = time.monotonic()
  assert cli.main(['demo', '--directory', str(tmp_path)]) == 0
  assert time.monotonic() - started < 20
  assert stamps == [(tmp_path / name).stat().st_mtime_ns for name in outputs]
