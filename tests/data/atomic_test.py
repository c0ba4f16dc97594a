import json
import os
import threading

import pytest

from msba_jax.data.atomic import write_atomically, write_json
from msba_jax.data.errors import InputError


def test_a_file_is_replaced_whole(tmp_path):
  path = tmp_path / 'new' / 'file.json'
  write_json(path, {'a': [1, 'é']})
  write_json(path, {'a': [2, 'é']})
  assert json.loads(path.read_text(encoding='utf-8')) == {'a': [2, 'é']}
  assert [p.name for p in path.parent.iterdir()] == ['file.json']


@pytest.mark.parametrize('moment', ['fsync', 'replace'])
def test_an_interruption_leaves_what_was_there(tmp_path, monkeypatch, moment):
  path = tmp_path / 'file'
  path.write_bytes(b'old')

  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(f'os.{moment}', interrupt)
  with pytest.raises(KeyboardInterrupt):
    write_atomically(path, b'new')
  assert path.read_bytes() == b'old'
  assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_a_goal_that_cannot_be_a_file_is_named(tmp_path):
  with pytest.raises(InputError, match='is a directory: name a file'):
    write_atomically(tmp_path, b'')
  (tmp_path / 'file').write_bytes(b'')
  with pytest.raises(InputError, match='is no directory'):
    write_atomically(tmp_path / 'file' / 'below', b'')


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
  file, link = tmp_path / 'below' / 'file', tmp_path / 'link'
  file.parent.mkdir()
  link.symlink_to(file)
  for content in (b'old', b'new'):
    write_atomically(link, content)
    assert link.is_symlink()
    assert file.read_bytes() == content


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
  pipe, read = tmp_path / 'pipe', []
  os.mkfifo(pipe)
  reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
  reader.start()
  write_atomically(pipe, b'content')
  reader.join()
  assert read == [b'content']
  assert pipe.is_fifo()
