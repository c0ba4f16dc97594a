"""Tests of `msba_jax.retrieval.index`."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from msba_jax.data.errors import InputError
from msba_jax.retrieval.embed import embed
from msba_jax.retrieval.index import build_index, open_index, search_index
from msba_jax.retrieval.rerank import refine_by_neighbours
from msba_jax.retrieval.search import search


@pytest.fixture(scope='module')
def built(tmp_path_factory, embedder, pictures, meshes):
  """An index with regions, of 50 pictures."""
  path = tmp_path_factory.mktemp('index') / 'index'
  build_index(
    path,
    embedder,
    pictures,
    regions=True,
    batch_size=16,
    mesh=meshes[1],
    progress=False,
  )
  return path


@pytest.fixture
def copied(built, tmp_path):
  """A copy of the index, to be damaged."""
  return shutil.copytree(built, tmp_path / 'copy')


def test_holds_what_embedding_gives(built, embedder, pictures, meshes):
  index = open_index(built, embedder.fingerprint)
  embedded = embed(
    embedder, pictures, batch_size=16, mesh=meshes[1], keep_regions=True,
    progress=False,
  )  # fmt: skip
  np.testing.assert_array_equal(index.vectors, embedded.vectors)
  np.testing.assert_array_equal(index.regions, embedded.regions)
  np.testing.assert_array_equal(index.labels, pictures.labels)
  assert index.ids == pictures.ids
  assert index.class_names == pictures.class_names
  assert index.image_shape == (8, 8, 3)
  assert len(index) == len(index.thumbnails) == 50
  assert isinstance(index.vectors, np.memmap)
  assert isinstance(index.regions, np.memmap)


def test_thumbnails_are_the_pictures(built, pictures):
  thumbnails = open_index(built).thumbnails
  for i in (0, 17, -1):
    picture = Image.open(io.BytesIO(thumbnails[i]))
    assert picture.size == (8, 8)
    difference = np.asarray(picture, float) - pictures.images[i]
    assert np.abs(difference).mean() < 60  # JPEG of noise
  assert thumbnails[3:5] == [thumbnails[3], thumbnails[4]]
  with pytest.raises(IndexError, match='index=50'):
    thumbnails[50]


def test_thumbnails_are_small_and_bytes_are_counted(
  tmp_path, embedder, pictures, meshes
):
  index = build_index(
    tmp_path / 'index', embedder, pictures, mesh=meshes[1], thumbnail_side=4,
    progress=False,
  )  # fmt: skip
  assert Image.open(io.BytesIO(index.thumbnails[0])).size == (4, 4)
  assert index.regions is None
  files = [f for f in index.directory.iterdir() if f.name != 'manifest.json']
  assert index.bytes_per_image['regions'] == 0
  assert index.bytes_per_image['total'] == pytest.approx(
    sum(file.stat().st_size for file in files) / 50
  )


def test_without_classes_there_are_no_labels(
  tmp_path, embedder, make_pictures, meshes
):
  source = make_pictures(5)
  source.class_names = ()
  index = build_index(
    tmp_path / 'index', embedder, source, mesh=meshes[1], progress=False
  )
  assert index.labels is None
  assert index.class_names == ()


def test_an_interrupted_build_leaves_the_old_index(
  copied, embedder, make_pictures, meshes
):
  options = {'batch_size': 8, 'mesh': meshes[1], 'progress': False}
  before = sorted(path.name for path in copied.iterdir())
  with pytest.raises(Exception, match='picture 30'):
    build_index(copied, embedder, make_pictures(broken=30), **options)
  assert sorted(path.name for path in copied.iterdir()) == before
  assert [path.name for path in copied.parent.iterdir()] == ['copy']
  assert open_index(copied, embedder.fingerprint).regions is not None


def test_a_new_index_replaces_the_old_one(
  copied, make_embedder, make_pictures, meshes
):
  other = make_embedder(seed=1)
  old = open_index(copied)
  build_index(copied, other, make_pictures(9), mesh=meshes[1], progress=False)
  index = open_index(copied, other.fingerprint)
  assert len(index) == 9
  assert index.regions is None
  assert not (copied / 'regions.npy').exists()
  assert np.isfinite(old.vectors).all()  # who had it open can still read it


@pytest.mark.parametrize(
  'name', ['vectors.npy', 'regions.npy', 'thumbnails.bin', 'ids.json']
)
def test_a_flipped_bit_is_found_and_its_file_named(copied, name):
  content = bytearray((copied / name).read_bytes())
  content[-5] ^= 1
  (copied / name).write_bytes(content)
  with pytest.raises(InputError, match=f'{name} is not what was written'):
    open_index(copied)


def test_another_model_is_refused(built, make_embedder, pictures):
  other = make_embedder(seed=1)
  with pytest.raises(InputError, match='was made by another model'):
    open_index(built, other.fingerprint)
  with pytest.raises(InputError, match='was made by another model'):
    search_index(open_index(built), other, pictures.images[:1], 3)


@pytest.mark.parametrize(
  'change',
  [{'images': 51}, {'format': 2}, {'image_shape': None}, {'fingerprint': 3}],
)
def test_a_manifest_that_lies_is_named(copied, change):
  path = copied / 'manifest.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  with pytest.raises(InputError, match=r'manifest\.json does not describe'):
    open_index(copied)


def test_what_cannot_be_indexed_is_named(
  tmp_path, embedder, make_pictures, pictures, meshes
):
  with pytest.raises(InputError, match='no image for the index'):
    build_index(tmp_path / 'index', embedder, make_pictures(0))
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='file is a file'):
    build_index(
      tmp_path / 'file', embedder, pictures, mesh=meshes[1], progress=False
    )
  with pytest.raises(InputError, match='cannot be written'):
    build_index(
      tmp_path / 'file' / 'index', embedder, pictures, mesh=meshes[1],
      progress=False,
    )  # fmt: skip
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_a_picture_finds_itself_first(built, embedder, pictures, meshes):
  found = search_index(
    open_index(built),
    embedder,
    pictures.images[[4, 30, 11]],
    80,
    mesh=meshes[1],
    progress=False,
  )
  assert found.indices.shape == (3, 50)
  np.testing.assert_array_equal(found.indices[:, 0], [4, 30, 11])
  np.testing.assert_allclose(found.scores[:, 0], 1, atol=1e-5)


def test_neighbours_reorder_the_head(built, embedder, make_pictures, meshes):
  index, queries = open_index(built), make_pictures(6, seed=5)
  options = {'mesh': meshes[1], 'progress': False}
  found = search_index(
    index, embedder, queries, 12, mode='neighbours', neighbours=5, depth=8,
    **options,
  )  # fmt: skip
  asked = embed(embedder, queries, keep_regions=True, **options)
  stored = index.regions, index.vectors
  refined = refine_by_neighbours(
    embedder, asked.regions, asked.vectors, *stored, k=5, **options
  )
  gallery = refine_by_neighbours(
    embedder, *stored, *stored, k=5, exclude_self=True, **options
  )
  solo = search(asked.vectors, index.vectors, 12, mesh=meshes[1])
  for row, before, query in zip(
    found.indices, solo.indices, refined, strict=True
  ):
    head = sorted(before[:8], key=lambda i: -float(gallery[i] @ query))
    np.testing.assert_array_equal(row, [*head, *before[8:]])


def test_neighbours_without_regions_is_refused_in_one_sentence(
  tmp_path, embedder, pictures, meshes
):
  index = build_index(
    tmp_path / 'index', embedder, pictures, mesh=meshes[1], progress=False
  )
  with pytest.raises(InputError, match='stores no regions') as caught:
    search_index(index, embedder, pictures.images[:1], 3, mode='neighbours')
  assert '\n' not in str(caught.value)
  assert '. ' not in str(caught.value)


def test_queries_of_another_size_are_refused(built, embedder, pictures):
  index = open_index(built)
  with pytest.raises(InputError, match=r'\(8, 4, 3\) cannot be searched'):
    search_index(index, embedder, pictures.images[:1, :, :4], 3)
  with pytest.raises(InputError, match='no image to search with'):
    search_index(index, embedder, pictures.images[:0], 3)
