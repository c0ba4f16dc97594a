"""Tests of `msba_jax.data.csv`."""

import pytest

from msba_jax.data.csv import CsvData
from msba_jax.data.errors import InputError

ROWS = (
  'a.jpg,ant,train',
  'b.jpg,bee,train',
  'c.jpg,cat,train',
  'd.jpg,dog,test',
  'e.jpg,dog,test',
  'f.jpg,eel,val',
)


@pytest.fixture
def listed(tmp_path, encode):
  """Writes a list and its pictures; returns what opens it."""

  def make(rows=ROWS, header='file,label,split', **options):
    for i, name in enumerate('abcdef'):
      (tmp_path / f'{name}.jpg').write_bytes(encode(i))
    path = tmp_path / 'list.csv'
    path.write_text('\n'.join([header, *rows]) + '\n', encoding='utf-8')
    options = {'size': 8, 'validation_classes': 1, **options}
    return CsvData(path=str(path), **options)

  return make


def test_a_list_with_splits(listed):
  train, validation, test = listed().open()[:3]
  assert train.class_names == ('ant', 'bee', 'cat')
  assert train.ids == ('a.jpg', 'b.jpg', 'c.jpg')
  assert validation.queries.class_names == ('eel',)
  assert test.queries.ids == ('d.jpg', 'e.jpg')
  assert test.gallery is None
  assert test.queries[1]['image'].shape == (8, 8, 3)


def test_roles_columns_in_any_order_quotes_and_a_byte_order_mark(listed):
  header = '\ufeffsplit,file,role,label,author'
  rows = (
    'train,a.jpg,,ant,x',
    'train,b.jpg,,"bee, striped",x',
    'test,c.jpg,query,cat,x',
    'test,./d.jpg,gallery,cat,x',
    'test,e.jpg,gallery,dog,x',
  )
  splits = listed(rows, header).open()
  assert splits.test.queries.ids == ('c.jpg',)
  assert splits.test.gallery.ids == ('d.jpg', 'e.jpg')
  assert splits.test.gallery.class_names == ('cat', 'dog')
  names = {*splits.train.class_names, *splits.validation.queries.class_names}
  assert names == {'ant', 'bee, striped'}


def test_without_splits_classes_are_divided(listed):
  rows = [f'{name}.jpg,{name}' for name in 'abcdef']
  splits = listed(rows, 'file,label').open()
  assert len(splits.test.queries) == 3
  assert len(splits.train) == 2


def test_files_in_a_zip(listed, tmp_path, pack, encode):
  folder = tmp_path / 'pictures'
  folder.mkdir()
  for i, name in enumerate('abcdef'):
    (folder / f'{name}.jpg').write_bytes(encode(i))
  splits = listed(root=pack(folder)).open()
  assert splits.train[0]['image'].shape == (8, 8, 3)


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ('x.jpg,ant,train', r'line 3: there is no .*/x\.jpg'),
    ('../x.jpg,ant,train', r"line 3: the path '\.\./x\.jpg' leaves"),
    ('/etc/x.jpg,ant,train', 'line 3: the path'),
    (',ant,train', 'line 3: the path'),
    ('b.jpg,,train', 'line 3: the label is empty'),
    ('b.jpg,ant,exam', r"line 3: split 'exam' is none of train, validation"),
    ('b.jpg,ant', 'line 3: it has fewer fields'),
    ('b.jpg,ant,train,query,x', 'line 3: it has more fields'),
    ('a.jpg,ant,train', r'line 3: a\.jpg stands in line 2 already'),
    ('"b.jpg,ant,train', r'list\.csv is no CSV file'),
  ],
)
def test_a_wrong_line_is_named_by_its_number(listed, row, message):
  with pytest.raises(InputError, match=message):
    listed([ROWS[0], row, *ROWS[2:]]).open()


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ('d.jpg,dog,test,ask', "line 3: role 'ask'"),
    ('d.jpg,dog,train,query', "line 3: role 'query' in split 'train'"),
    ('d.jpg,dog,test,', 'line 3: role is empty, but other test images'),
    ('d.jpg,dog,train,', 'has no query images'),
  ],
)
def test_a_wrong_role_is_named_by_its_line(listed, row, message):
  rows = ['a.jpg,ant,train,', row, 'e.jpg,dog,test,gallery']
  with pytest.raises(InputError, match=message):
    listed(rows, 'file,label,split,role').open()


@pytest.mark.parametrize('header', ['file,split', 'label,split', ''])
def test_a_missing_column_is_named(listed, header):
  with pytest.raises(InputError, match='line 1: there is no column'):
    listed(header=header).open()


def test_lists_that_are_none(listed, tmp_path):
  data = listed(rows=[])
  with pytest.raises(InputError, match='lists no images'):
    data.open()
  (tmp_path / 'list.csv').write_bytes(b'file,label\n\xff\xfe,x\n')
  with pytest.raises(InputError, match='is no CSV file in UTF-8'):
    data.open()
  (tmp_path / 'list.csv').unlink()
  with pytest.raises(InputError, match=r'list\.csv cannot be read'):
    data.open()


@pytest.mark.parametrize('missing', ['train', 'test'])
def test_a_missing_split_is_named(listed, missing):
  rows = [row for row in ROWS if not row.endswith(missing)]
  with pytest.raises(InputError, match=f'has no {missing} images'):
    listed(rows).open()


def test_a_broken_image_is_named(listed, tmp_path):
  splits = listed().open()
  (tmp_path / 'e.jpg').write_bytes(b'GIF89a')
  with pytest.raises(InputError, match=r'/e\.jpg is'):
    splits.test.queries[1]
