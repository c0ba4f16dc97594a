"""Tests of `msba_jax.data.folder`."""

import logging

import numpy as np
import pytest

from msba_jax.data.errors import InputError
from msba_jax.data.folder import FolderData
from msba_jax.data.splits import SplitNames

APART = {
  'train': {'ant': 2, 'bee': 3, 'cat': 1},
  'test': {'dog': 2, 'eel': 3},
}


def opened(path, **options):
  options = {'size': 8, 'validation_classes': 1, **options}
  return FolderData(path=str(path), **options).open()


def classes(source):
  return set(source.class_names)


@pytest.mark.parametrize('form', ['folder', 'zip', 'zip with a folder'])
def test_split_class_file(plant, pack, form):
  folder = plant(APART)
  (folder / 'notes.csv').write_text('to be passed over')
  (folder / 'train' / '.DS_Store').write_text('too')
  path = {
    'folder': lambda: folder,
    'zip': lambda: pack(folder),
    'zip with a folder': lambda: pack(folder, inside=True),
  }[form]()
  train, validation, test = opened(path)[:3]
  assert test.gallery is None
  assert validation.gallery is None
  assert test.queries.class_names == ('dog', 'eel')
  assert test.queries.labels.tolist() == [0, 0, 1, 1, 1]
  held = classes(validation.queries)
  assert len(held) == 1
  assert held | classes(train) == {'ant', 'bee', 'cat'}
  assert not held & classes(train)
  assert len(train) + len(validation.queries) == 6
  record = test.queries[4]
  assert record['image'].shape == (8, 8, 3)
  assert record['label'] == 1
  assert test.queries.ids[4].endswith('test/eel/2.jpg')


@pytest.mark.parametrize('name', ['val', 'validation', 'choice'])
def test_a_validation_split_is_used(plant, name):
  folder = plant({**APART, name: {'fox': 2}})
  names = SplitNames(validation='choice' if name == 'choice' else None)
  splits = opened(folder, splits=names)
  assert splits.validation.queries.class_names == ('fox',)
  assert splits.train.class_names == ('ant', 'bee', 'cat')


def test_a_validation_split_that_shares_classes_is_joined(plant, caplog):
  folder = plant({**APART, 'val': {'ant': 2}})
  splits = opened(folder)
  assert 'validation splits share classes' in caplog.text
  assert len(splits.train) + len(splits.validation.queries) == 8
  assert not classes(splits.train) & classes(splits.validation.queries)


def test_query_and_gallery(plant):
  folder = plant(
    {
      'train': APART['train'],
      'query': {'dog': 1, 'eel': 2},
      'gallery': {'dog': 2, 'eel': 1, 'fox': 1},
    }
  )
  test = opened(folder).test
  assert test.queries.class_names == test.gallery.class_names
  assert test.queries.labels.tolist() == [0, 1, 1]
  assert test.gallery.labels.tolist() == [0, 0, 1, 2]


def test_a_query_needs_its_class_in_the_gallery(plant):
  folder = plant(
    {'train': APART['train'], 'query': {'dog': 1}, 'gallery': {'eel': 1}}
  )
  with pytest.raises(InputError, match="'dog' is asked for but not in the gal"):
    opened(folder)


def test_shared_classes_are_divided_anew_and_it_is_said(plant, caplog):
  shared = dict.fromkeys('abcdef', 2)
  folder = plant({'train': shared, 'test': shared})
  train, validation, test = opened(folder)[:3]
  assert 'share 6 classes' in caplog.text
  parts = [classes(s) for s in (train, validation.queries, test.queries)]
  assert [len(part) for part in parts] == [2, 1, 3]
  assert set.union(*parts) == set('abcdef')
  assert len(train) == 8  # images of both splits
  assert classes(opened(folder, seed=1).test.queries) != parts[2]


def test_own_splits_must_not_share_classes(plant):
  folder = plant({'train': {'ant': 1, 'bee': 1}, 'test': {'ant': 1}})
  with pytest.raises(InputError, match=r"share 1 classes, as 'ant'.*random"):
    opened(folder, class_split='own')


def test_the_first_classes_train(plant):
  shared = dict.fromkeys('fedcba', 1)
  folder = plant({'train': shared, 'test': shared})
  train, validation, test = opened(folder, class_split='first')[:3]
  assert test.queries.class_names == ('d', 'e', 'f')
  assert classes(train) | classes(validation.queries) == set('abc')


@pytest.mark.parametrize('form', ['folder', 'zip'])
def test_class_file_without_splits(plant, pack, form, caplog):
  folder = plant({'': dict.fromkeys('abcdefgh', 2)})
  path = folder if form == 'folder' else pack(folder)
  train, validation, test = opened(path, test_fraction=0.25)[:3]
  parts = [classes(s) for s in (train, validation.queries, test.queries)]
  assert [len(part) for part in parts] == [5, 1, 2]
  assert set.union(*parts) == set('abcdefgh')
  assert not caplog.records


def test_a_missing_split_is_named(plant):
  with pytest.raises(InputError, match=r"photos has no split 'test' .it has"):
    opened(plant({'train': APART['train']}))
  folder = plant({'learn': APART['train'], 'test': APART['test']}, root='other')
  with pytest.raises(InputError, match=r"no split 'train' .*learn, test"):
    opened(folder)
  splits = opened(folder, splits=SplitNames(train='learn'))
  assert len(splits.test.queries) == 5
  folder = plant({'x': APART['train'], 'y': {'dog': 1}}, root='third')
  with pytest.raises(InputError, match=r"no split 'train' .it has x, y"):
    opened(folder)


def test_a_single_split_can_be_divided(plant):
  folder = plant({'train': dict.fromkeys('abcd', 1)})
  splits = opened(folder, class_split='random')
  assert len(splits.test.queries) == 2


@pytest.mark.parametrize('form', ['folder', 'zip'])
def test_an_empty_class_is_named(plant, pack, form):
  folder = plant(APART)
  (folder / 'train' / 'gnu').mkdir()
  path = folder if form == 'folder' else pack(folder)
  with pytest.raises(InputError, match='train/gnu/ has no images'):
    opened(path)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('train/ant/x.txt', r'ant/x\.txt is no image of a known format'),
    ('train/x.jpg', r'train/x\.jpg lies in no class'),
    ('train/ant/deep/x.jpg', r'train/ant/deep/ lies too deep'),
  ],
)
def test_what_does_not_belong_is_named(plant, encode, name, message):
  folder = plant(APART)
  (folder / name).parent.mkdir(exist_ok=True)
  (folder / name).write_bytes(encode())
  with pytest.raises(InputError, match=message):
    opened(folder)


@pytest.mark.parametrize('cache', [False, True])
def test_a_broken_image_is_named(plant, cache):
  folder = plant(APART)
  (folder / 'test' / 'eel' / '1.jpg').write_bytes(b'something else')
  with pytest.raises(InputError, match=r'photos/test/eel/1\.jpg is no image'):
    opened(folder, cache=cache).test.queries[3]


def test_an_empty_folder_and_no_folder(tmp_path):
  with pytest.raises(InputError, match=r"no split 'train' .it has none"):
    opened(tmp_path)
  with pytest.raises(InputError, match='nowhere does not exist'):
    opened(tmp_path / 'nowhere')


@pytest.mark.parametrize('count', [0, 3, 9])
def test_the_number_of_validation_classes_must_fit(plant, count):
  with pytest.raises(InputError, match=f'validation_classes={count} must'):
    opened(plant(APART), validation_classes=count)


@pytest.mark.parametrize('fraction', [0.0, 1.0, -1.0])
def test_the_test_fraction_must_leave_classes(plant, fraction):
  folder = plant({'': {'a': 1, 'b': 1, 'c': 1}})
  with pytest.raises(InputError, match=f'test_fraction={fraction}'):
    opened(folder, test_fraction=fraction)


def test_caching_changes_no_picture(plant, tmp_path, caplog):
  caplog.set_level(logging.WARNING)
  folder = plant(APART)
  plain = opened(folder)
  for options in ({'cache': True}, {'cache_dir': str(tmp_path / 'kept')}):
    kept = opened(folder, **options)
    assert kept.test.queries.ids == plain.test.queries.ids
    for i in range(5):
      np.testing.assert_array_equal(
        kept.test.queries[i]['image'], plain.test.queries[i]['image']
      )
  assert len(list((tmp_path / 'kept').glob('*.npy'))) == 1


def test_images_of_training_classes_are_held_out(plant):
  folder = plant({**APART, 'train': {'ant': 4, 'bee': 4, 'cat': 4}})
  assert opened(folder).seen is None
  splits = opened(folder, held_out_images=1)
  assert splits.seen.gallery is None
  assert splits.seen.queries.class_names == splits.train.class_names
  assert len(splits.seen.queries) == 2
  assert len(splits.train) == 6
  assert not set(splits.seen.queries.ids) & set(splits.train.ids)
  # What validates and tests stays as it is.
  assert len(splits.validation.queries) == 4
  assert splits.test.queries.ids == opened(folder).test.queries.ids


def test_a_share_of_the_training_images_is_trained_on(plant):
  folder = plant({**APART, 'train': {'ant': 10, 'bee': 10, 'cat': 10}})
  whole = opened(folder, held_out_images=2)
  found = [
    opened(folder, held_out_images=2, train_share=share)
    for share in (0.1, 0.5, 1.0)
  ]
  assert [np.bincount(s.train.labels).tolist() for s in found] == [
    [2, 2],
    [4, 4],
    [8, 8],
  ]
  ids = [set(splits.train.ids) for splits in found]
  assert ids[0] < ids[1] < ids[2] == set(whole.train.ids)
  for splits in found:
    assert splits.train.class_names == whole.train.class_names
    assert splits.seen.queries.ids == whole.seen.queries.ids
    assert splits.validation.queries.ids == whole.validation.queries.ids
    assert splits.test.queries.ids == whole.test.queries.ids
  assert found[2].train.fingerprint() == whole.train.fingerprint()
  assert len({s.train.fingerprint() for s in found}) == 3
  with pytest.raises(InputError, match=r'train_share=2\.0 must be above 0'):
    opened(folder, train_share=2.0)
