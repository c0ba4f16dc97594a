"""Tests of `msba_jax.data.prefetch`."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from msba_jax.data import prefetch
from msba_jax.data.errors import InputError
from msba_jax.data.source import Record


class Numbers:
  """Pictures that say their index; number 13 may be broken."""

  def __init__(self, broken=None):
    self.labels = (np.arange(40) // 4).astype(np.int32)
    self.class_names = tuple('abcdefghij')
    self.ids = tuple(f'file {i}' for i in range(40))
    self.broken = broken

  def __len__(self):
    return 40

  def __getitem__(self, index):
    if index == self.broken:
      raise InputError(f'{self.ids[index]} is broken')
    time.sleep(0.001 * (index % 3))  # so that threads finish in any order
    image = np.full((2, 2, 3), index, np.uint8)
    return Record(image=image, label=int(self.labels[index]))


def plan(step):
  return np.array([step, step + 1, 2 * step])


def read(source=None, **options):
  options = {'start': 3, 'stop': 12, **options}
  return list(prefetch.batches(source or Numbers(), plan, **options))


@pytest.mark.parametrize('threads', [0, 1, 4])
@pytest.mark.parametrize('buffer', [0, 1, 7])
def test_what_comes_does_not_depend_on_threads(threads, buffer):
  batches = read(threads=threads, buffer=buffer)
  assert [batch['step'] for batch in batches] == list(range(3, 12))
  for batch in batches:
    indices = plan(batch['step'])
    np.testing.assert_array_equal(batch['index'], indices)
    np.testing.assert_array_equal(batch['label'], indices // 4)
    np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], indices)
    assert batch['image'].dtype == np.uint8
    assert batch['image'].shape == (3, 2, 2, 3)
    assert batch['label'].dtype == np.int32
    assert batch['index'].dtype == np.int64


def test_starting_later_gives_the_same_batches():
  late, early = read(start=8), read()[5:]
  for one, other in zip(late, early, strict=True):
    np.testing.assert_array_equal(one['image'], other['image'])


@pytest.mark.parametrize('threads', [0, 3])
def test_an_error_comes_in_its_place(threads):
  iterator = prefetch.batches(
    Numbers(broken=13), plan, start=3, stop=40, threads=threads
  )
  seen = [next(iterator)['step'] for _ in range(9)]
  assert seen == [3, 4, 5, 6, 7, 8, 9, 10, 11]
  with pytest.raises(InputError, match=r'^file 13 is broken'):
    next(iterator)


def test_stopping_early_leaves_no_threads():
  before = threading.active_count()
  iterator = prefetch.batches(Numbers(), plan, start=0, stop=10**9, threads=3)
  next(iterator)
  iterator.close()
  deadline = time.monotonic() + 10
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert threading.active_count() <= before


def test_no_steps_no_batches():
  assert read(start=5, stop=5) == []


@pytest.mark.parametrize(
  'wrong', [{'start': 13}, {'start': -1}, {'threads': -1}, {'buffer': -1}]
)
def test_impossible_numbers_are_refused(wrong):
  with pytest.raises(ValueError, match='must not be negative'):
    read(**wrong)


def test_pictures_of_a_batch_have_one_shape():
  class Uneven(Numbers):
    def __getitem__(self, index):
      return Record(image=np.zeros((2, 2 + index, 3), np.uint8), label=0)

  with pytest.raises(ValueError, match='differ in shape'):
    read(Uneven())


def test_loading_starts_no_device_and_imports_no_tensorflow():
  code = (
    'import sys, msba_jax.data.prefetch, msba_jax.data.folder, '
    'msba_jax.data.csv, msba_jax.data.tfds, msba_jax.data.transforms, '
    'msba_jax.data.corruptions, msba_jax.data.plan; '
    'from jax._src import xla_bridge; '
    'assert not xla_bridge._backends; '
    'assert not {"tensorflow", "torch"} & set(sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)
