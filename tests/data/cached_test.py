"""Tests of `msba_jax.data.cached`."""

import json
import os

import numpy as np
import pytest

from msba_jax.data import cached
from msba_jax.data.errors import InputError
from msba_jax.data.source import Record, Source


class Counted:
  """A source that counts how often it decodes."""

  def __init__(self, number=150, salt='a', broken=None):
    self.labels = (np.arange(number) % 3).astype(np.int32)
    self.class_names = ('ant', 'bee', 'cat')
    self.ids = tuple(f'file {i}' for i in range(number))
    self.salt, self.broken, self.decoded = salt, broken, 0

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    self.decoded += 1
    if index == self.broken:
      raise InputError(f'{self.ids[index]} is broken')
    image = np.full((4, 5, 3), index, np.uint8)
    return Record(image=image, label=int(self.labels[index]))

  def fingerprint(self):
    return f'{self.salt}{len(self)}'


def keep(source, directory=None, **options):
  directory = None if directory is None else str(directory)
  return cached.CachedSource(source, directory, progress=False, **options)


@pytest.mark.parametrize('threads', [1, 4])
@pytest.mark.parametrize('on_disk', [False, True])
def test_pictures_are_decoded_once(tmp_path, threads, on_disk):
  source = Counted()
  kept = keep(source, tmp_path if on_disk else None, threads=threads)
  assert isinstance(kept, Source)
  decoded = source.decoded
  assert decoded == 151  # the first one tells the shape
  for i in (0, 77, 149):
    assert kept[i]['label'] == i % 3
    np.testing.assert_array_equal(kept[i]['image'], np.uint8(i))
  assert source.decoded == decoded
  assert kept.ids == source.ids
  assert kept.images.shape == (150, 4, 5, 3)
  with pytest.raises(ValueError, match='read-only'):
    kept.images[0] = 0


def test_what_stands_is_used_again(tmp_path):
  keep(Counted(), tmp_path)
  again = Counted()
  kept = keep(again, tmp_path)
  assert again.decoded == 0
  assert int(kept[9]['image'].max()) == 9
  assert sorted(os.listdir(tmp_path)) == [
    f'{kept.fingerprint()[:32]}.npy',
    f'{kept.fingerprint()[:32]}.npy.json',
  ]


def test_another_source_has_another_file(tmp_path):
  keep(Counted(), tmp_path)
  other = Counted(salt='b')
  keep(other, tmp_path)
  assert other.decoded > 0
  assert len(list(tmp_path.glob('*.npy'))) == 2


def flip(path):
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize(
  'damage',
  [
    flip,
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(b''),
    lambda path: path.with_name(f'{path.name}.json').unlink(),
    lambda path: path.with_name(f'{path.name}.json').write_text('['),
    lambda path: path.with_name(f'{path.name}.json').write_text('[]'),
    lambda path: path.with_name(f'{path.name}.json').write_text(
      json.dumps({'shape': [3], 'sha256': ''})
    ),
  ],
)
def test_what_is_damaged_is_made_anew(tmp_path, damage, caplog):
  keep(Counted(), tmp_path)
  damage(next(iter(tmp_path.glob('*.npy'))))
  again = Counted()
  kept = keep(again, tmp_path)
  assert 'decoding anew' in caplog.text
  assert again.decoded > 0
  assert int(kept[149]['image'].min()) == 149


@pytest.mark.parametrize('on_disk', [False, True])
def test_a_broken_image_is_named_and_nothing_is_left(tmp_path, on_disk):
  with pytest.raises(InputError, match='file 90 is broken'):
    keep(Counted(broken=90), tmp_path if on_disk else None)
  assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='choose another cache_dir'):
    keep(Counted(), tmp_path / 'file' / 'below')


def test_keeping_on_disk_needs_a_fingerprint(tmp_path):
  class Plain(Counted):
    fingerprint = None

  assert len(keep(Plain())) == 150
  with pytest.raises(TypeError, match='Plain has no fingerprint'):
    keep(Plain(), tmp_path)


def test_pictures_must_have_one_size():
  class Uneven(Counted):
    def __getitem__(self, index):
      return Record(image=np.zeros((4, 4 + index, 3), np.uint8), label=0)

  with pytest.raises(InputError, match='several sizes cannot be cached'):
    keep(Uneven())


def test_nothing_is_cached_unasked():
  source = Counted()
  assert cached.cached(source, keep=False, directory=None) is source
