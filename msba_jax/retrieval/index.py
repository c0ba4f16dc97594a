"""An index: a directory with what a search needs, and proof that it is whole.

| file | content |
|---|---|
| `vectors.npy` | solo embeddings, float32, (n, e) |
| `ids.json` | names of the images |
| `labels.npy`, `classes.json` | labels, where the source knows classes |
| `thumbnails.bin`, `thumbnails.npy` | JPEG pictures and their offsets |
| `regions.npy` | regions for `neighbours`, float16, (n, l, r, d); optional |
| `manifest.json` | the model's fingerprint; size and SHA-256 of each file |

It is built as a stream: beside the names of the images, memory holds a few
batches. It takes its place when it is complete. Arrays are memory-mapped when
it is opened.

Attributes:
  Index: an open index.
  build_index: embeds a source into a directory.
  open_index: opens a directory and checks it.
  search_index: asks it with images.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float16, Float32, Int32, UInt8

from msba_jax.data.directory import (
  MANIFEST,
  BrokenError,
  atomic_directory,
  read_manifest,
  write_manifest,
)
from msba_jax.data.errors import InputError
from msba_jax.data.source import Source
from msba_jax.retrieval.embed import (
  ArraySource,
  Embedder,
  embed,
  embed_batches,
)
from msba_jax.retrieval.index_files import write_arrays, write_names
from msba_jax.retrieval.rerank import refine_by_neighbours, rerank
from msba_jax.retrieval.search import Neighbours, search
from msba_jax.retrieval.thumbnails import Thumbnails

__all__ = ['Index', 'build_index', 'open_index', 'search_index']

FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
  """An open index.

  Attributes:
    directory: where it stands.
    fingerprint: of the embedder that made it.
    image_shape: (height, width, 3) of the images it was made from; queries
      have the same.
    vectors: solo embeddings.
    ids: names of the images.
    labels: indices into `class_names`; None if the classes are not known.
    class_names: names of the classes.
    thumbnails: JPEG bytes of each image.
    regions: what the mode `neighbours` needs; None if they were not stored.
    bytes_per_image: size on the disk by kind, and `total`.
  """

  directory: Path
  fingerprint: str
  image_shape: tuple[int, ...]
  vectors: Float32[np.ndarray, 'n e']
  ids: tuple[str, ...]
  labels: Int32[np.ndarray, ' n'] | None
  class_names: tuple[str, ...]
  thumbnails: Thumbnails
  regions: Float16[np.ndarray, 'n l r d'] | None
  bytes_per_image: Mapping[str, float]

  def __len__(self) -> int:
    return len(self.ids)


def build_index(
  directory: str | os.PathLike[str],
  embedder: Embedder,
  source: Source,
  *,
  regions: bool = False,
  batch_size: int = 256,
  thumbnail_side: int = 96,
  mesh: Mesh | None = None,
  progress: bool = True,
) -> Index:
  """Embeds a source, each image by itself, and stores it as a directory.

  Until everything is written and on the disk, what stood there stays; an index
  is replaced in one step.

  Args:
    directory: where the index shall stand.
    embedder: the model; searching needs the same.
    source: the images; without `class_names` their labels are not stored.
    regions: also store the regions that the mode `neighbours` needs.
    batch_size: how many images are embedded at a time.
    thumbnail_side: the longer side of a thumbnail, in pixels.
    mesh: the devices; None takes all of this process.
    progress: shows a bar with speed and remaining time.

  Returns:
    The index, open.

  Raises:
    InputError: there is no image, one cannot be used, or the directory holds
      something else or cannot be written.
  """
  if len(source) == 0:
    raise InputError(
      f'there is no image for the index {directory}: name a source with images'
    )
  try:
    with atomic_directory(directory) as partial:
      shape = write_arrays(
        partial,
        embed_batches(
          embedder,
          source,
          batch_size=batch_size,
          mesh=mesh,
          keep_regions=regions,
          progress=progress,
        ),
        number=len(source),
        side=thumbnail_side,
      )
      write_names(partial, source)
      facts = {
        'format': FORMAT,
        'fingerprint': embedder.fingerprint,
        'images': len(source),
        'image_shape': list(shape),
      }
      write_manifest(partial, facts)
  except OSError as error:
    raise InputError(
      f'the index {directory} cannot be written ({error}): name a directory '
      'with space that is yours'
    ) from error
  return open_index(directory, embedder.fingerprint, verify='sizes')


def open_index(
  directory: str | os.PathLike[str],
  fingerprint: str | None = None,
  *,
  verify: Literal['hashes', 'sizes'] = 'hashes',
) -> Index:
  """Opens an index after checking that it is what was written.

  Args:
    directory: as `build_index` left it.
    fingerprint: of the embedder that will search; None does not compare.
    verify: `hashes` reads every file whole (about a gigabyte a second); `sizes`
      is for opening a large index again that was verified before.

  Returns:
    The index; its arrays are memory-mapped.

  Raises:
    InputError: no index stands there, a file of it is missing or changed, or
      another model made it.
  """
  directory = Path(directory)
  if not (directory / MANIFEST).is_file():
    raise InputError(
      f'{directory} is no index, it has no {MANIFEST}: build one with '
      '`msba index`'
    )
  try:
    manifest = read_manifest(directory, verify=verify)
    index = _assemble(directory, manifest)
  except BrokenError as error:
    raise InputError(f'{error}: build the index again') from error
  except (OSError, KeyError, TypeError, ValueError) as error:
    raise InputError(
      f'{directory / MANIFEST} does not describe its directory ({error!r}): '
      'build the index again'
    ) from error
  if fingerprint is not None:
    _check_model(directory, index.fingerprint, fingerprint)
  return index


def search_index(
  index: Index,
  embedder: Embedder,
  images: UInt8[np.ndarray, 'q height width 3'] | Source,
  k: int,
  *,
  mode: Literal['solo', 'neighbours'] = 'solo',
  neighbours: int = 20,
  depth: int = 100,
  batch_size: int = 256,
  mesh: Mesh | None = None,
  progress: bool = True,
) -> Neighbours:
  """Finds the images of an index that are most like the given ones.

  In the mode `neighbours` the first `depth` results are re-ordered: the query
  is refined by its nearest images of the index, and so is each result.

  Args:
    index: what answers.
    embedder: the model that made the index.
    images: what is asked, of the size `index.image_shape`.
    k: how many results; no more than the index has are given.
    mode: whether to re-order the results.
    neighbours: how many images make a context.
    depth: how many results are re-ordered; later ones keep their order.
    batch_size: how many images are embedded at a time.
    mesh: the devices; None takes all of this process.
    progress: shows bars with speed and remaining time.

  Returns:
    Scores and positions in the index, best first. In the mode `neighbours` the
    scores of re-ordered results are products of refined vectors.

  Raises:
    InputError: another model made the index, it stores no regions but the mode
      needs them, or the images have another size.
  """
  source = ArraySource(images) if isinstance(images, np.ndarray) else images
  _check_query(index, embedder, source, mode)
  asked = embed(
    embedder,
    source,
    batch_size=batch_size,
    mesh=mesh,
    keep_regions=mode == 'neighbours',
    progress=progress,
  )
  if mode == 'solo':
    return search(asked.vectors, index.vectors, k, mesh=mesh)
  found = search(asked.vectors, index.vectors, max(k, depth), mesh=mesh)
  assert asked.regions is not None
  assert index.regions is not None
  refine = functools.partial(
    refine_by_neighbours,
    embedder,
    gallery_regions=index.regions,
    gallery_vectors=index.vectors,
    k=neighbours,
    mesh=mesh,
    progress=progress,
  )
  # Several queries may share a result: each is refined once.
  head = found.indices[:, :depth]
  rows, places = np.unique(head, return_inverse=True)
  scores, indices = rerank(
    found,
    refine(asked.regions, asked.vectors),
    refine(index.regions[rows], index.vectors[rows], exclude=rows)[
      places.reshape(head.shape)
    ],
  )
  return Neighbours(scores[:, :k], indices[:, :k])


def _check_query(
  index: Index, embedder: Embedder, source: Source, mode: str
) -> None:
  _check_model(index.directory, index.fingerprint, embedder.fingerprint)
  if mode == 'neighbours' and index.regions is None:
    raise InputError(
      f'the index {index.directory} stores no regions, which the mode '
      'neighbours needs: build it again with regions, or search in mode solo'
    )
  if len(source) == 0:
    raise InputError('there is no image to search with: name one')
  shape = source[0]['image'].shape
  if shape != index.image_shape:
    raise InputError(
      f'an image of shape {shape} cannot be searched in the index '
      f'{index.directory} of images {index.image_shape}: resize it'
    )


def _check_model(directory: Path, made: str, used: str) -> None:
  if made != used:
    raise InputError(
      f'the index {directory} was made by another model ({made[:12]}… instead '
      f'of {used[:12]}…): search with that model, or build the index again'
    )


def _read_json(path: Path) -> Any:
  return json.loads(path.read_text(encoding='utf-8'))


def _assemble(directory: Path, manifest: dict[str, Any]) -> Index:
  """Opens the files; raises ValueError if they do not fit together."""
  if manifest['format'] != FORMAT:
    raise ValueError(f'format {manifest["format"]}, not {FORMAT}')
  files, number = manifest['files'], manifest['images']
  labels, class_names, regions = None, (), None
  if 'labels.npy' in files:
    labels = np.load(directory / 'labels.npy')
    class_names = tuple(_read_json(directory / 'classes.json'))
  if 'regions.npy' in files:
    regions = np.load(directory / 'regions.npy', mmap_mode='r')
  sizes = {
    kind: sum(files[name]['bytes'] for name in files if kind in name) / number
    for kind in ('vectors', 'regions', 'thumbnails')
  }
  sizes['names'] = (
    sum(
      files[name]['bytes']
      for name in ('ids.json', 'labels.npy', 'classes.json')
      if name in files
    )
    / number
  )
  index = Index(
    directory=directory,
    fingerprint=manifest['fingerprint'],
    image_shape=tuple(manifest['image_shape']),
    vectors=np.load(directory / 'vectors.npy', mmap_mode='r'),
    ids=tuple(_read_json(directory / 'ids.json')),
    labels=labels,
    class_names=class_names,
    thumbnails=Thumbnails(directory),
    regions=regions,
    bytes_per_image={**sizes, 'total': sum(sizes.values())},
  )
  for name in ('vectors', 'ids', 'labels', 'thumbnails', 'regions'):
    part = getattr(index, name)
    if part is not None and len(part) != number:
      raise ValueError(f'{len(part)} {name} of {number} images')
  return index
