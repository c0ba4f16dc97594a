"""Tests of `msba_jax.data.scenes.builder` and `msba_jax.data.scenes.source`."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tyro

from msba_jax.data.errors import InputError
from msba_jax.data.scenes import builder as builder_lib
from msba_jax.data.scenes.config import PRESETS
from msba_jax.data.scenes.scene import draw_scene
from msba_jax.data.scenes.source import ScenesData
from msba_jax.data.source import Source

FEW = {
  'size': 32, 'train_classes': 4, 'validation_classes': 3, 'test_classes': 3,
  'train_scenes': 12, 'validation_scenes': 6, 'test_scenes': 6,
}  # fmt: skip

WITHOUT_TENSORFLOW = """
import sys
from msba_jax.data.scenes.source import ScenesData
splits = ScenesData(
  size=16, train_classes=2, validation_classes=2, test_classes=2,
  train_scenes=2, validation_scenes=2, test_scenes=2, data_dir=sys.argv[1],
).open()
splits.train[0], splits.test.queries.scene(1)
print([name for name in sys.modules if name.split('.')[0] == 'tensorflow'])
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A small data set with a shifted test, prepared once."""
  directory = str(tmp_path_factory.mktemp('data'))
  data = ScenesData(
    **FEW, occlusion=0.3, hue_correlation=0.95, data_dir=directory
  )
  data.prepare()
  return data


def test_a_stored_scene_equals_a_drawn_one(data):
  splits = data.open()
  for source, split in (
    (splits.train, 'train'),
    (splits.validation.queries, 'validation'),
    (splits.test.queries, 'test'),
  ):
    for i in range(len(source)):
      stored = source.scene(i)
      drawn = draw_scene(0, stored.number, data.knobs, split=split)
      for name, a, b in zip(drawn._fields, drawn, stored, strict=True):
        if isinstance(a, np.ndarray):
          np.testing.assert_array_equal(a, b, err_msg=name)
          assert a.dtype == b.dtype
        else:
          assert a == b, name
      record = source[i]
      np.testing.assert_array_equal(record['image'], drawn.image)
      name = source.class_names[record['label']]
      assert record['label'] == source.labels[i]
      template = builder_lib.make_templates(0, data.knobs)[drawn.label]
      assert name == template.name
      assert source.ids[i] == f'{split}/{drawn.number:06d}'


def test_sources_keep_the_contract(data):
  train, validation, test = data.open()[:3]
  assert validation.gallery is None
  assert test.gallery is None
  for source in (train, validation.queries, test.queries):
    assert isinstance(source, Source)
    assert source.labels.dtype == np.int32
    assert len(source) == len(source.labels) == len(set(source.ids))
    counts = np.bincount(source.labels)
    assert len(counts) == len(source.class_names)
    assert counts.max() - counts.min() <= 1
  names = [
    set(s.class_names) for s in (train, validation.queries, test.queries)
  ]
  assert sum(map(len, names)) == len(set.union(*names))
  # Neighbours in the order say nothing of each other's class.
  assert not np.array_equal(train.labels, np.arange(12) % 4)
  with pytest.raises(IndexError):
    train[len(train)]


def test_threads_may_read_at_once(data):
  train = data.open().train
  with ThreadPoolExecutor(4) as pool:
    images = list(pool.map(lambda i: train[i % 12]['image'], range(48)))
  for i, image in enumerate(images):
    np.testing.assert_array_equal(image, train[i % 12]['image'])


def test_the_shifted_test_is_opened(data):
  shifted = ScenesData(**{**vars(data), 'shifted': True})
  plain, moved = data.open().test.queries, shifted.open().test.queries
  np.testing.assert_array_equal(plain.labels, moved.labels)
  assert moved.ids[0].startswith('shifted/')
  assert plain.fingerprint() != moved.fingerprint()
  for i in range(len(plain)):
    assert plain.scene(i).objects == moved.scene(i).objects
  with pytest.raises(InputError, match='hue_correlation'):
    ScenesData(shifted=True)


def test_what_stands_is_used_again(data, monkeypatch):
  def draw(*args, **kwargs):
    raise AssertionError('drawn again')

  monkeypatch.setattr(builder_lib, 'draw_scene', draw)
  assert len(data.open().train) == 12
  other = ScenesData(**{**vars(data), 'seed': 1})
  with pytest.raises(AssertionError, match='drawn again'):
    other.open()


def test_fewer_training_scenes_are_the_same_scenes(data, monkeypatch):
  def draw(*args, **kwargs):
    raise AssertionError('drawn again')

  monkeypatch.setattr(builder_lib, 'draw_scene', draw)
  whole = data.open()
  less = ScenesData(**{**vars(data), 'train_share': 0.7}).open()
  assert set(less.train.ids) < set(whole.train.ids)
  assert np.bincount(less.train.labels).tolist() == [2] * 4
  assert less.train.class_names == whole.train.class_names
  place = whole.train.ids.index(less.train.ids[3])
  np.testing.assert_array_equal(
    less.train[3]['image'], whole.train[place]['image']
  )
  assert less.validation.queries.ids == whole.validation.queries.ids
  assert less.test.queries.fingerprint() == whole.test.queries.fingerprint()
  with pytest.raises(InputError, match=r'train_share=0\.0 must be above 0'):
    ScenesData(train_share=0.0)


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
  data = ScenesData(**FEW, data_dir=str(tmp_path))

  def interrupt(seed, index, config, *, split):
    if index == 3:
      raise KeyboardInterrupt
    return draw_scene(seed, index, config, split=split)

  with monkeypatch.context() as patch:
    patch.setattr(builder_lib, 'draw_scene', interrupt)
    with pytest.raises(KeyboardInterrupt):
      data.open()
  assert not list(tmp_path.rglob('*record*'))
  assert len(data.open().train) == 12


def test_a_killed_preparation_is_done_again(data, tmp_path):
  """What SIGKILL leaves has another name than what is complete."""
  killed = ScenesData(**{**vars(data), 'data_dir': str(tmp_path)})
  code = (
    'import os, msba_jax.data.scenes.builder as b\n'
    'from msba_jax.data.scenes.source import ScenesData\n'
    'draw = b.draw_scene\n'
    'def kill(seed, index, config, **k):\n'
    '  if index == 5: os.kill(os.getpid(), 9)\n'
    '  return draw(seed, index, config, **k)\n'
    'b.draw_scene = kill\n'
    f'{killed!r}.open()\n'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True)
  assert done.returncode == -9
  assert any('incomplete' in str(path) for path in tmp_path.rglob('*'))
  assert len(killed.open().train) == 12


def test_no_tensorflow_in_the_process(tmp_path):
  run = subprocess.run(
    [sys.executable, '-W', 'error', '-c', WITHOUT_TENSORFLOW, str(tmp_path)],
    capture_output=True, text=True,
  )  # fmt: skip
  assert run.returncode == 0, run.stderr
  assert run.stdout == '[]\n'
  assert 'scene/s' in run.stderr  # a progress bar with its speed
  assert 'WARNING' not in run.stderr


def test_presets_are_builder_configurations():
  names = {config.name: config for config in builder_lib.Scenes.BUILDER_CONFIGS}
  assert names.keys() == PRESETS.keys()
  assert names['shortcut'].scenes.hue_correlation == 0.95
  assert names['shortcut'].scenes.shifted_correlation == 0.05
  assert 'shifted' in names['shortcut'].sizes
  assert sum(names['standard'].sizes.values()) == 8000


def test_knobs_are_flags():
  data = tyro.cli(
    ScenesData,
    args=['--size', '48', '--occlusion', '0.2', '--hue-correlation', '0.95'],
  )
  assert (data.size, data.occlusion, data.hue_correlation) == (48, 0.2, 0.95)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'train_scenes': 3}, 'train_scenes=3 leaves classes empty'),
    ({'seed': -1}, 'seed=-1'),
  ],
)
def test_bad_numbers_are_refused(fields, message):
  with pytest.raises(InputError, match=message):
    ScenesData(**fields)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  data = ScenesData(**FEW, data_dir=str(tmp_path / 'file'))
  with pytest.raises(InputError, match='choose another data_dir'):
    data.open()
