"""Tests of `msba_jax.data.scenes.details`."""

import dataclasses

import numpy as np
import pytest

from msba_jax.data.scenes.details import CLASSES, DetailData, DetailSource
from msba_jax.data.scenes.objects import RADII
from msba_jax.data.source import Source
from tests.data.scenes_builder_test import FEW

MANY = FEW | {
  'train_scenes': 60, 'validation_scenes': 40, 'test_scenes': 40,
  'most_objects': 4,
}  # fmt: skip


@pytest.fixture(scope='module', params=['smallest', 'largest'])
def data(request, tmp_path_factory):
  directory = str(tmp_path_factory.getbasetemp() / 'details')
  return DetailData(**MANY, detail=request.param, data_dir=directory)


def test_the_class_is_that_of_the_one_object_of_extreme_size(data):
  scenes = data.sources()[0]
  source = DetailSource(scenes, data.detail)
  assert isinstance(source, Source)
  extreme = min if data.detail == 'smallest' else max
  expected = {}
  for i in range(len(scenes)):
    objects = scenes.scene(i).objects
    size = extreme((RADII[thing.size], thing.size) for thing in objects)[1]
    of_this_size = [thing for thing in objects if thing.size == size]
    if len(of_this_size) == 1:
      thing = of_this_size[0]
      expected[scenes.ids[i]] = f'{thing.texture} {thing.shape}'
  assert 0 < len(expected) < len(scenes)
  names = [source.class_names[label] for label in source.labels]
  assert dict(zip(source.ids, names, strict=True)) == expected
  for i in (0, len(source) - 1):
    record = source[i]
    assert record['label'] == source.labels[i]
    place = scenes.ids.index(source.ids[i])
    np.testing.assert_array_equal(record['image'], scenes[place]['image'])


def test_no_detail_is_in_two_parts(data):
  splits = data.open()
  parts = splits.train, splits.validation.queries, splits.test.queries
  names = [set(part.class_names) for part in parts]
  assert [len(part) for part in names] == [16, 8, 8]
  assert set.union(*names) == {f'{t} {s}' for s, t in CLASSES}
  for part, split in zip(parts, ('train', 'validation', 'test'), strict=True):
    assert all(name.startswith(split) for name in part.ids)
  assert splits.test.gallery is None
  again = data.open()
  assert again.train.fingerprint() == splits.train.fingerprint()
  np.testing.assert_array_equal(again.train.labels, splits.train.labels)


def test_a_share_of_the_training_images_leaves_the_others_alone(data):
  whole = data.open()
  less = dataclasses.replace(data, train_share=0.5).open()
  assert set(less.train.ids) < set(whole.train.ids)
  assert less.train.class_names == whole.train.class_names
  assert less.validation.queries.ids == whole.validation.queries.ids


def test_the_detail_is_part_of_the_fingerprint(tmp_path_factory):
  directory = str(tmp_path_factory.getbasetemp() / 'details')
  found = [
    DetailData(**MANY, detail=detail, data_dir=directory).open().train
    for detail in ('smallest', 'largest')
  ]
  assert found[0].fingerprint() != found[1].fingerprint()
