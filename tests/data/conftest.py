"""Tiny pictures and collections for the tests of `msba_jax.data`."""

import io

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def encode():
  """A picture that depends on a number, encoded: `encode(3, 'PNG')`."""

  def make(number=0, kind='JPEG', *, size=(12, 10), mode='RGB', **options):
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()

  return make


@pytest.fixture
def plant(tmp_path, encode):
  """Writes pictures below a new folder: `plant({'train': {'ant': 3}})`."""

  def write(tree, root='photos'):
    number = 0
    for split, classes in tree.items():
      for name, count in classes.items():
        folder = tmp_path / root / split / name
        folder.mkdir(parents=True)
        for i in range(count):
          number += 1
          (folder / f'{i}.jpg').write_bytes(encode(number))
    return tmp_path / root

  return write


@pytest.fixture
def pack(tmp_path):
  """Packs a folder into a zip and returns its path."""
  import shutil

  def make(folder, inside=None):
    root = folder if inside is None else folder.parent
    base = None if inside is None else folder.name
    name = str(tmp_path / f'{folder.name}{"" if inside is None else "-in"}')
    return shutil.make_archive(name, 'zip', root, base)

  return make
