"""Embeds a collection of images with a trained model into an index directory.

The collection is a folder or a zip with images anywhere inside, or `train`,
`validation` or `test`: a split of the data that the run was made with. The
class of an image in a folder is the name of the folder that it lies in.

Attributes:
  Options: the flags of `msba index`.
  run: builds the index.
  open_collection: a folder, a zip or a split as a source.
  image_interpolation: how images were resized for a run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

if TYPE_CHECKING:
  from msba_jax.data.images import Interpolation
  from msba_jax.data.source import Source
  from msba_jax.training.run import Run

EXAMPLES = """\
  msba index runs/scenes_msba/seed0 test test.index
  msba index runs/scenes_msba/seed0 photos/ photos.index --regions
  msba index runs/scenes_msba/seed0 photos.zip photos.index
"""
INTERRUPTED = 'No index was written; what stood there before still stands.'

SPLITS = ('train', 'validation', 'test')


@dataclass(frozen=True)
class Options:
  """Flags of `msba index`."""

  run: Annotated[Path, Positional, arg(metavar='RUN')]
  """Directory of the trained run, as `msba train` made it."""
  collection: Annotated[str, Positional, arg(metavar='COLLECTION')]
  """Folder or zip of images, or train, validation, test: a split of the run."""
  out: Annotated[Path, Positional, arg(metavar='OUT')]
  """Directory of the index; an index that stands there is replaced."""
  regions: bool = False
  """Also store what `msba search --mode neighbours` needs."""
  batch_size: int = 256
  """Images embedded at a time."""


def run(options: Options) -> int:
  """Builds the index; 0 when it stands."""
  from msba_jax.retrieval.index import build_index
  from msba_jax.training.run import load_run

  trained = load_run(options.run)
  index = build_index(
    options.out,
    trained.embedder,
    open_collection(options.collection, trained),
    regions=options.regions,
    batch_size=options.batch_size,
  )
  print(f'The index of {len(index):,} images stands in {options.out}.')
  sizes = ', '.join(
    f'{name} {size:,.0f}' for name, size in index.bytes_per_image.items()
  )
  print(f'Bytes per image: {sizes}.')
  return 0


def open_collection(collection: str, trained: 'Run') -> 'Source':
  """A folder, a zip or a split as a source.

  Args:
    collection: path, or the name of a split.
    trained: the run, for its data and the size of its images.

  Returns:
    The images; of a split with its own gallery, the gallery.

  Raises:
    InputError: there is nothing of that name, or no image in it.
  """
  if collection in SPLITS:
    splits = trained.experiment.data.open()
    if collection == 'train':
      return splits.train
    evaluation = getattr(splits, collection)
    return evaluation.gallery or evaluation.queries
  from msba_jax.data.errors import InputError
  from msba_jax.data.files import FileSource, open_store
  from msba_jax.data.images import is_image_name

  store = open_store(collection)
  entries = [e for e in store.entries() if is_image_name(e.name)]
  if not entries:
    raise InputError(f'{collection} holds no image: name another folder or zip')
  folders = [entry.name.rpartition('/')[0] for entry in entries]
  names = sorted(set(folders) - {''})
  number = {name: i for i, name in enumerate(names)}
  if '' in folders:  # images without a folder have no class: nobody has one
    names, number = [], dict.fromkeys(folders, 0)
  return FileSource(
    store,
    entries,
    [number[folder] for folder in folders],
    names,
    size=image_side(trained),
    interpolation=image_interpolation(trained),
  )


def image_interpolation(trained: 'Run') -> 'Interpolation':
  """How images were resized for a run; bicubic where its data do not say."""
  return getattr(trained.experiment.data, 'interpolation', 'bicubic')


def image_side(trained: 'Run') -> int:
  """The side in pixels of the images that a run was made with.

  Args:
    trained: the run.

  Returns:
    `data.size` of its experiment.

  Raises:
    InputError: its data are not images of one size, such as cached features.
  """
  from msba_jax.data.errors import InputError

  size = getattr(trained.experiment.data, 'size', None)
  if not isinstance(size, int):
    raise InputError(
      f'the run {trained.directory} was not trained on images of one size: '
      'index one of its splits'
    )
  return size
