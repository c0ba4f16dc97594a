"""Tests of `msba_jax.data.directory`."""

import json
import os
import subprocess
import sys

import pytest

from msba_jax.data import directory
from msba_jax.data.errors import InputError


def fill(path, text):
  """Builds a directory of two files around a text."""
  with directory.atomic_directory(path) as partial:
    (partial / 'a.txt').write_text(text)
    (partial / 'b.txt').write_text(text[::-1])
    directory.write_manifest(partial, {'text': text})


def names_beside(path):
  return sorted(other.name for other in path.parent.iterdir())


@pytest.fixture(params=['exchanged', 'renamed'])
def way(request, monkeypatch):
  """With the system's exchange of two names, and where there is none."""
  if request.param == 'renamed':
    monkeypatch.setattr(directory, '_exchange', lambda one, other: False)


@pytest.mark.usefixtures('way')
def test_replaces_what_stood_there_and_leaves_nothing_beside(tmp_path):
  goal = tmp_path / 'deep' / 'goal'
  for text in ('one', 'two'):
    fill(goal, text)
    assert directory.read_manifest(goal)['text'] == text
    assert (goal / 'b.txt').read_text() == text[::-1]
    assert names_beside(goal) == ['goal']


@pytest.mark.skipif(sys.platform != 'linux', reason='renameat2 is of Linux')
def test_linux_exchanges_in_one_step(tmp_path):
  one, other = tmp_path / 'one', tmp_path / 'other'
  one.mkdir()
  (other / 'inside').mkdir(parents=True)
  assert directory._exchange(one, other)
  assert (one / 'inside').is_dir()
  assert not (other / 'inside').exists()


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_one(tmp_path, error):
  goal = tmp_path / 'goal'
  fill(goal, 'old')

  def build():
    with directory.atomic_directory(goal) as partial:
      (partial / 'a.txt').write_text('new')
      raise error

  with pytest.raises(error):
    build()
  assert directory.read_manifest(goal)['text'] == 'old'
  assert names_beside(goal) == ['goal']


def test_a_killed_process_leaves_the_old_one_and_the_next_cleans_up(tmp_path):
  goal = tmp_path / 'goal'
  fill(goal, 'old')
  code = f"""
import os, signal
from msba_jax.data.directory import atomic_directory
with atomic_directory({str(goal)!r}) as partial:
  (partial / 'a.txt').write_text('new')
  os.kill(os.getpid(), signal.SIGKILL)
"""
  done = subprocess.run([sys.executable, '-c', code], timeout=60, check=False)
  assert done.returncode == -9
  assert directory.read_manifest(goal)['text'] == 'old'
  assert len(names_beside(goal)) == 2
  fill(goal, 'new')
  assert directory.read_manifest(goal)['text'] == 'new'
  assert names_beside(goal) == ['goal']


def test_a_replacement_that_was_cut_in_two_is_mended(tmp_path):
  goal = tmp_path / 'goal'
  fill(goal, 'old')
  goal.rename(tmp_path / 'goal.old-999999999')
  with (
    pytest.raises(RuntimeError),
    directory.atomic_directory(goal),
  ):
    raise RuntimeError
  assert directory.read_manifest(goal)['text'] == 'old'


def test_what_a_living_process_builds_is_left_alone(tmp_path):
  other = tmp_path / f'goal.partial-{os.getppid()}'
  other.mkdir()
  fill(tmp_path / 'goal', 'text')
  assert other.is_dir()


def test_what_is_no_index_is_not_overwritten(tmp_path):
  photos = tmp_path / 'photos'
  photos.mkdir()
  (photos / 'cat.jpg').write_text('cat')
  with pytest.raises(
    InputError, match='photos is not empty and has no manifest'
  ):
    fill(photos, 'text')
  with pytest.raises(InputError, match=r'cat\.jpg is a file'):
    fill(photos / 'cat.jpg', 'text')
  assert names_beside(photos / 'cat.jpg') == ['cat.jpg']
  (photos / 'cat.jpg').unlink()
  fill(photos, 'text')
  assert directory.read_manifest(photos)['text'] == 'text'


def test_a_link_stays_a_link(tmp_path):
  fill(tmp_path / 'real', 'old')
  link = tmp_path / 'link'
  link.symlink_to(tmp_path / 'real')
  fill(link, 'new')
  assert link.is_symlink()
  assert directory.read_manifest(tmp_path / 'real')['text'] == 'new'


def test_what_was_changed_is_named(tmp_path):
  goal = tmp_path / 'goal'
  fill(goal, 'text')
  (goal / 'a.txt').write_text('tent')
  directory.read_manifest(goal, verify='sizes')
  with pytest.raises(InputError, match=r'a\.txt is not what was written'):
    directory.read_manifest(goal)
  (goal / 'a.txt').write_text('longer')
  with pytest.raises(InputError, match=r'a\.txt has 6 bytes where 4'):
    directory.read_manifest(goal, verify='sizes')
  (goal / 'a.txt').unlink()
  with pytest.raises(InputError, match=r'a\.txt is missing'):
    directory.read_manifest(goal)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', 'cannot be read'),
    ('[]', 'cannot be read'),
    ('{"files": {"a.txt": 3}}', 'cannot be read'),
    ('{"files": {"a.txt": {"bytes": "x", "sha256": ""}}}', 'cannot be read'),
    (
      json.dumps({'files': {'../x': {'bytes': 1, 'sha256': ''}}}),
      'no file of it',
    ),
  ],
)
def test_a_broken_manifest_is_named(tmp_path, text, message):
  (tmp_path / 'manifest.json').write_text(text)
  with pytest.raises(InputError, match=rf'manifest\.json.*{message}'):
    directory.read_manifest(tmp_path)


def test_without_a_manifest_it_was_not_finished(tmp_path):
  for path in (tmp_path, tmp_path / 'nowhere'):
    with pytest.raises(InputError, match='was not finished'):
      directory.read_manifest(path)
