"""Tests of `msba_jax.data.tfds`, on a tiny data set shaped like CUB."""

import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from msba_jax.data.errors import InputError
from msba_jax.data.prefetch import batches
from msba_jax.data.splits import SplitNames
from msba_jax.data.tfds import TfdsData
from tests.data.birds import birds_info

CLASSES = ('001.Albatross', '002.Auklet', '003.Bunting', '004.Cardinal')


def encoded(number, kind='JPEG', mode='RGB'):
  rng = np.random.default_rng(number)
  file = io.BytesIO()
  pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
  Image.fromarray(pixels).convert(mode).save(file, kind)
  file.seek(0)
  return file


class TinyBirds(tfds.core.GeneratorBasedBuilder):
  """Pictures with the features of caltech_birds2011."""

  VERSION = tfds.core.Version('0.2.0')

  def _info(self):
    return birds_info(self, list(CLASSES))

  def _split_generators(self, dl_manager):
    return {'train': self._pictures(8, 0), 'test': self._pictures(4, 100)}

  def _generate_examples(self):
    raise NotImplementedError

  def _pictures(self, number, offset):
    for i in range(number):
      yield (
        i,
        {
          'image': encoded(offset + i),
          'image/filename': f'{i}.jpg',
          'bbox': tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
          'label': i % 4,
          'segmentation_mask': encoded(i, 'PNG', 'L'),
        },
      )


class TinyPairs(TinyBirds):
  """Two pictures, and a label that is a plain number."""

  def _info(self):
    features = tfds.features.FeaturesDict(
      {
        'left': tfds.features.Image(),
        'right': tfds.features.Image(),
        'number': np.int64,
      }
    )
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _pictures(self, number, offset):
    for i in range(number):
      pair = {'left': encoded(i), 'right': encoded(offset + i + 9)}
      yield i, {**pair, 'number': 10 * (i % 4)}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  directory = str(tmp_path_factory.mktemp('tensorflow_datasets'))
  for kind in (TinyBirds, TinyPairs):
    kind(data_dir=directory, file_format='array_record').download_and_prepare()
  return directory


def opened(prepared, name='tiny_birds', **options):
  options = {'size': 16, 'validation_classes': 1, **options}
  return TfdsData(name=name, data_dir=prepared, **options).open()


def test_the_first_classes_train_as_is_customary_for_cub(prepared):
  train, validation, test = opened(prepared, class_split='first')[:3]
  assert test.queries.class_names == CLASSES[2:]
  assert test.gallery is None
  names = {*train.class_names, *validation.queries.class_names}
  assert names == set(CLASSES[:2])
  assert len(test.queries) == 6
  assert {i.split('/')[0] for i in test.queries.ids} == {'train', 'test'}


def test_pictures_and_labels_are_those_of_the_data_set(prepared):
  splits = opened(prepared, class_split='first', size=20)
  data = tfds.builder_from_directory(f'{prepared}/tiny_birds/0.2.0')
  for source in (splits.train, splits.test.queries):
    for i, name in enumerate(source.ids):
      split, number = name.split('/')
      example = data.as_data_source(split)[int(number)]
      record = source[i]
      expected = example['image'][:, 5:25]
      np.testing.assert_array_equal(record['image'], expected)
      assert source.class_names[record['label']] == CLASSES[example['label']]


def test_shared_classes_are_divided_and_it_is_said(prepared, caplog):
  splits = opened(prepared)
  assert 'share 4 classes' in caplog.text
  train = {*splits.train.class_names, *splits.validation.queries.class_names}
  assert not train & set(splits.test.queries.class_names)
  with pytest.raises(InputError, match='share 4 classes'):
    opened(prepared, class_split='own')


def test_threads_read_the_same(prepared):
  source = opened(prepared, class_split='first').test.queries
  runs = [
    list(
      batches(
        source,
        lambda step: np.array([step % 6, (5 * step + 1) % 6]),
        start=0,
        stop=12,
        threads=threads,
      )
    )
    for threads in (0, 4)
  ]
  for one, other in zip(*runs, strict=True):
    np.testing.assert_array_equal(one['image'], other['image'])
    np.testing.assert_array_equal(one['label'], other['label'])


def test_decoded_pictures_can_be_kept(prepared, tmp_path):
  plain = opened(prepared).train
  kept = opened(prepared, cache_dir=str(tmp_path)).train
  np.testing.assert_array_equal(plain[0]['image'], kept[0]['image'])
  again = opened(prepared, cache_dir=str(tmp_path)).train
  assert again.fingerprint() == kept.fingerprint()
  assert len(list(tmp_path.glob('*.npy'))) == 1


def test_keys_are_guessed_or_named(prepared):
  with pytest.raises(InputError, match=r'image_key=None .*left, right'):
    opened(prepared, 'tiny_pairs')
  with pytest.raises(InputError, match='label_key=None names no label'):
    opened(prepared, 'tiny_pairs', image_key='left')
  with pytest.raises(InputError, match='image_key=middle names no image'):
    opened(prepared, 'tiny_pairs', image_key='middle')
  keys = {'image_key': 'left', 'label_key': 'number'}
  splits = opened(prepared, 'tiny_pairs', class_split='first', **keys)
  assert splits.test.queries.class_names == ('20', '30')


def test_a_version_may_be_named(prepared):
  assert len(opened(prepared, 'tiny_birds:0.2.0').train) > 0
  with pytest.raises(InputError, match=r'tiny_birds:1\.0\.0 is not prepared'):
    opened(prepared, 'tiny_birds:1.0.0')


def test_a_missing_split_is_named(prepared):
  with pytest.raises(InputError, match=r"no split 'exam' .it has test, train"):
    opened(prepared, splits=SplitNames(test='exam'))


@pytest.mark.parametrize('name', ['caltech_birds2011', 'no_such_thing'])
def test_what_is_not_prepared_names_the_command(prepared, name):
  command = f'tfds build {name} --data_dir={prepared} --file_format=array_rec'
  with pytest.raises(InputError, match=command):
    opened(prepared, name)


@pytest.mark.parametrize('name', ['../tiny_birds', '/tiny_birds', ''])
def test_names_do_not_leave_the_directory(prepared, name):
  with pytest.raises(InputError, match='is no name of a data set'):
    opened(prepared, name)


def test_configs_are_listed(prepared, tmp_path):
  source = pathlib.Path(prepared, 'tiny_birds', '0.2.0')
  for config in ('large', 'small'):
    (tmp_path / 'birds' / config).mkdir(parents=True)
    (tmp_path / 'birds' / config / '0.2.0').symlink_to(source)
  with pytest.raises(InputError, match='one of birds/large, birds/small'):
    opened(str(tmp_path), 'birds')
  assert len(opened(str(tmp_path), 'birds/small').train) > 0


def test_other_formats_and_broken_metadata_are_refused(prepared, tmp_path):
  source = pathlib.Path(prepared, 'tiny_birds', '0.2.0')
  target = tmp_path / 'tiny_birds' / '0.2.0'
  target.mkdir(parents=True)
  for file in source.iterdir():
    (target / file.name).write_bytes(file.read_bytes())
  info = json.loads((target / 'dataset_info.json').read_text())
  info['fileFormat'] = 'tfrecord'
  (target / 'dataset_info.json').write_text(json.dumps(info))
  with pytest.raises(InputError, match='not in ArrayRecord format: prepare it'):
    opened(str(tmp_path))
  (target / 'dataset_info.json').write_text('{')
  with pytest.raises(InputError, match=r'cannot be read .*tfds build'):
    opened(str(tmp_path))


def test_missing_and_broken_records_are_named(prepared, tmp_path):
  source = pathlib.Path(prepared, 'tiny_birds', '0.2.0')
  target = tmp_path / 'tiny_birds' / '0.2.0'
  target.mkdir(parents=True)
  for file in source.iterdir():
    (target / file.name).write_bytes(file.read_bytes())
  shard = next(iter(target.glob('*train*')))
  shard.write_bytes(shard.read_bytes()[:1000])
  with pytest.raises(InputError, match=r'tiny_birds.*cannot be read'):
    opened(str(tmp_path))
  shard.unlink()
  with pytest.raises(InputError, match=r'tiny_birds.*cannot be read'):
    opened(str(tmp_path))


def test_no_tensorflow_is_imported(prepared):
  code = (
    'import sys; from msba_jax.data.tfds import TfdsData; '
    f'data = TfdsData(name="tiny_birds", data_dir={prepared!r}, '
    'validation_classes=1, class_split="first"); '
    'data.open().train[0]; assert "tensorflow" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], check=True)
