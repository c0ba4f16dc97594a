"""Tests of `msba_jax.data.files`."""

import os
import stat
import threading
import zipfile

import numpy as np
import pytest

from msba_jax.data import files, images
from msba_jax.data.errors import InputError

TREE = {'train': {'ant': 2, 'bee': 1}}


@pytest.fixture(params=['folder', 'zip'])
def store(request, plant, pack):
  folder = plant(TREE)
  return files.open_store(
    str(folder) if request.param == 'folder' else pack(folder)
  )


def test_both_stores_list_and_read_the_same(plant, pack):
  folder = plant(TREE)
  (folder / 'train' / 'ant' / '.DS_Store').write_bytes(b'')
  stores = files.open_store(str(folder)), files.open_store(pack(folder))
  names = [[entry.name for entry in store.entries()] for store in stores]
  expected = [
    'train/', 'train/ant/', 'train/ant/0.jpg', 'train/ant/1.jpg',
    'train/bee/', 'train/bee/0.jpg',
  ]  # fmt: skip
  assert names == [expected, expected]
  for name in expected:
    if not name.endswith('/'):
      one, other = (store.read(name) for store in stores)
      assert one == other == (folder / name).read_bytes()


def test_an_entry_is_found_by_its_name(store):
  entry = store.entry('train/ant/0.jpg')
  assert entry in store.entries()
  assert store.entry('train/ant/9.jpg') is None


def test_a_source_decodes_from_any_thread(store):
  entries = [e for e in store.entries() if e.name.endswith('.jpg')]
  source = files.FileSource(store, entries, [0, 0, 1], ['ant', 'bee'], size=8)
  here = [source[i]['image'] for i in range(3)]
  there = []
  thread = threading.Thread(
    target=lambda: there.extend(source[i]['image'] for i in range(3))
  )
  thread.start()
  thread.join()
  np.testing.assert_array_equal(here, there)
  assert [source[i]['label'] for i in range(3)] == [0, 0, 1]
  assert source.ids[0] == 'train/ant/0.jpg'


def test_the_fingerprint_changes_with_a_file(plant):
  folder = plant(TREE)

  def fingerprint(size=8):
    store = files.open_store(str(folder))
    entries = [e for e in store.entries() if e.name.endswith('.jpg')]
    labels = [0] * len(entries)
    source = files.FileSource(store, entries, labels, ['ant'], size=size)
    return source.fingerprint()

  first = fingerprint()
  assert first == fingerprint()
  assert first != fingerprint(size=9)
  os.utime(folder / 'train' / 'ant' / '0.jpg', ns=(1, 1))
  assert first != fingerprint()


@pytest.mark.parametrize(
  'name',
  [
    '../a.jpg',
    'a/../../b.jpg',
    '/etc/a.jpg',
    'C:\\a.jpg',
    '..\\a.jpg',
    '',
    '.',
  ],
)
def test_paths_out_of_the_root_are_refused(name):
  with pytest.raises(InputError, match=r'here: the path .* leaves the root'):
    files.check_inside(name, where='here')


def test_a_zip_with_a_path_out_of_the_root_is_refused(tmp_path, encode):
  path = tmp_path / 'bad.zip'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('train/ant/../../../../x.jpg', encode())
  with pytest.raises(InputError, match=r'bad\.zip: the path .*x\.jpg. leaves'):
    files.open_store(str(path))


def test_a_link_in_a_zip_is_refused(tmp_path):
  path = tmp_path / 'bad.zip'
  info = zipfile.ZipInfo('train/ant/x.jpg')
  info.external_attr = (stat.S_IFLNK | 0o777) << 16
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr(info, '/etc/passwd')
  with pytest.raises(InputError, match=r'the link train/ant/x\.jpg'):
    files.open_store(str(path))


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_a_name_twice_in_a_zip_is_refused(tmp_path, encode):
  path = tmp_path / 'bad.zip'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('train/ant/x.jpg', encode(0))
    archive.writestr('train/ant/x.jpg', encode(1))
  with pytest.raises(InputError, match=r'train/ant/x\.jpg twice'):
    files.open_store(str(path))


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_a_link_out_of_the_folder_is_refused(plant, tmp_path, encode, kind):
  folder = plant(TREE)
  outside = tmp_path / 'outside'
  outside.mkdir()
  (outside / 'x.jpg').write_bytes(encode())
  link = folder / 'train' / ('ant/x.jpg' if kind == 'file' else 'cat')
  link.symlink_to(outside / 'x.jpg' if kind == 'file' else outside)
  store = files.open_store(str(folder))
  with pytest.raises(InputError, match=f'{link.name} is a link that leaves'):
    store.entries()
  name = 'train/ant/x.jpg' if kind == 'file' else 'train/cat/x.jpg'
  with pytest.raises(InputError, match='is a link that leaves'):
    store.entry(name)


def test_a_link_inside_the_folder_is_followed(plant):
  folder = plant(TREE)
  (folder / 'train' / 'bee' / 'x.jpg').symlink_to('../ant/0.jpg')
  store = files.open_store(str(folder))
  assert store.read('train/bee/x.jpg') == store.read('train/ant/0.jpg')
  assert 'train/bee/x.jpg' in [entry.name for entry in store.entries()]


def test_a_root_that_is_a_link_is_fine(plant, tmp_path):
  (tmp_path / 'link').symlink_to(plant(TREE))
  assert len(files.open_store(str(tmp_path / 'link')).entries()) == 6


def test_a_pipe_is_refused_not_waited_for(plant):
  folder = plant(TREE)
  os.mkfifo(folder / 'train' / 'ant' / 'x.jpg')
  store = files.open_store(str(folder))
  with pytest.raises(InputError, match=r'ant/x\.jpg is no regular file'):
    store.entries()
  with pytest.raises(InputError, match=r'ant/x\.jpg is no regular file'):
    store.entry('train/ant/x.jpg')


def test_a_broken_link_is_refused(plant):
  folder = plant(TREE)
  (folder / 'train' / 'ant' / 'x.jpg').symlink_to('nowhere.jpg')
  with pytest.raises(InputError, match=r'ant/x\.jpg is no regular file'):
    files.open_store(str(folder)).entries()


def test_flipped_bits_in_a_zip_name_the_entry(plant, pack):
  path = pack(plant(TREE))
  with zipfile.ZipFile(path) as archive:
    offset = archive.getinfo('train/ant/0.jpg').header_offset
  with open(path, 'r+b') as file:
    file.seek(offset + 200)
    byte = file.read(1)
    file.seek(offset + 200)
    file.write(bytes([byte[0] ^ 16]))
  store = files.open_store(path)
  with pytest.raises(InputError, match=r'photos\.zip/train/ant/0\.jpg is brok'):
    store.read('train/ant/0.jpg')


def test_a_truncated_zip_and_other_files_are_refused(plant, pack, tmp_path):
  path = pack(plant(TREE))
  with open(path, 'r+b') as file:
    file.truncate(300)
  with pytest.raises(InputError, match=r'photos\.zip cannot be read as a zip'):
    files.open_store(path)
  with pytest.raises(InputError, match='nowhere does not exist'):
    files.open_store(str(tmp_path / 'nowhere'))


def test_a_file_that_vanishes_is_named(plant):
  folder = plant(TREE)
  store = files.open_store(str(folder))
  (folder / 'train' / 'ant' / '0.jpg').unlink()
  with pytest.raises(InputError, match=r'ant/0\.jpg cannot be read'):
    store.read('train/ant/0.jpg')


def test_a_gigantic_file_is_not_read(store, monkeypatch):
  monkeypatch.setattr(images, 'MAX_BYTES', 10)
  with pytest.raises(InputError, match=r'ant/0\.jpg has .* more than 10'):
    store.read('train/ant/0.jpg')


def test_labels_must_match_entries(store):
  with pytest.raises(ValueError, match='labels'):
    files.FileSource(store, [], [1], ['ant'], size=8)
