"""Images in, unit vectors out, in batches of one shape over all devices.

Every image is embedded by itself or with a memory; no image ever sees the
others of its batch, so a vector does not depend on which images happen to be
embedded together. The last batch is filled up with images that are thrown
away.

Attributes:
  Embedder: a model with its parameters and normalisation, of `embedder`.
  Embedded: vectors, labels and ids of a collection.
  EmbeddedBatch: a piece of a collection on its way.
  ArraySource: images in memory as a source without labels.
  embed: embeds a source.
  embed_batches: the same, piece by piece, for what does not fit in memory.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float16, Float32, Int, UInt8
from tqdm import tqdm

from msba_jax.data.errors import InputError
from msba_jax.data.prefetch import batches
from msba_jax.data.progress import progress_bar
from msba_jax.data.source import Record, Source
from msba_jax.models.context import solo
from msba_jax.retrieval.devices import copy_to_all, local_mesh, spread
from msba_jax.retrieval.embedder import Embedder

__all__ = [
  'ArraySource',
  'Embedded',
  'EmbeddedBatch',
  'Embedder',
  'embed',
  'embed_batches',
]


class Embedded(NamedTuple):
  """A collection after embedding.

  Attributes:
    vectors: unit vectors.
    regions: unprojected regions of every image, or None if not kept.
    labels: indices into the `class_names` of the source.
    ids: names of the images.
  """

  vectors: Float32[np.ndarray, 'n e']
  regions: Float16[np.ndarray, 'n l r d'] | None
  labels: Int[np.ndarray, ' n']
  ids: tuple[str, ...]


class EmbeddedBatch(NamedTuple):
  """Consecutive images of a collection after embedding.

  Attributes:
    start: position of the first one in the source.
    images: what was embedded, a pytree of arrays (b, …).
    vectors: unit vectors.
    regions: unprojected regions, or None if not kept.
  """

  start: int
  images: Any
  vectors: Float32[np.ndarray, 'b e']
  regions: Float16[np.ndarray, 'b l r d'] | None


class ArraySource:
  """Images in memory as a source; all labels are 0 of no class.

  Args:
    images: all of one size.
  """

  def __init__(self, images: UInt8[np.ndarray, 'n height width 3']):
    self._images = images
    self.labels = np.zeros(len(images), np.int32)
    self.class_names: tuple[str, ...] = ()
    self.ids = tuple(str(i) for i in range(len(images)))

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Record:
    return Record(image=self._images[index], label=0)


def embed(
  embedder: Embedder,
  source: Source,
  *,
  batch_size: int = 256,
  mesh: Mesh | None = None,
  context: Any = solo,
  keep_regions: bool = False,
  progress: bool = True,
) -> Embedded:
  """Embeds every image of a source.

  Args:
    embedder: the model.
    source: the images.
    batch_size: how many at a time; a smaller source takes a smaller batch.
    mesh: spreads each batch; None takes all devices of this process.
    context: `solo`, or a memory that every image looks at.
    keep_regions: keep what re-ranking by neighbours needs, as float16.
    progress: shows a bar with speed and remaining time.

  Returns:
    Vectors, regions, labels and ids, in the order of the source.

  Raises:
    InputError: the source is empty, or an embedding is not finite.
  """
  vectors: np.ndarray | None = None
  regions: np.ndarray | None = None
  for piece in embed_batches(
    embedder,
    source,
    batch_size=batch_size,
    mesh=mesh,
    context=context,
    keep_regions=keep_regions,
    progress=progress,
  ):
    rows = slice(piece.start, piece.start + len(piece.vectors))
    if vectors is None:
      vectors = _rows_for(source, piece.vectors)
    vectors[rows] = piece.vectors
    if piece.regions is not None:
      if regions is None:
        regions = _rows_for(source, piece.regions)
      regions[rows] = piece.regions
  assert vectors is not None
  return Embedded(
    vectors, regions, np.asarray(source.labels), tuple(source.ids)
  )


def _rows_for(source: Source, piece: np.ndarray) -> np.ndarray:
  return np.empty((len(source), *piece.shape[1:]), piece.dtype)


def embed_batches(
  embedder: Embedder,
  source: Source,
  *,
  batch_size: int = 256,
  mesh: Mesh | None = None,
  context: Any = solo,
  keep_regions: bool = False,
  progress: bool = True,
) -> Iterator[EmbeddedBatch]:
  """Embeds a source piece by piece, in its order.

  While a batch is computed the next one is read, so the devices do not wait.

  Args:
    embedder: the model.
    source: the images.
    batch_size: how many at a time; a smaller source takes a smaller batch.
    mesh: spreads each batch; None takes all devices of this process.
    context: `solo`, or a memory that every image looks at.
    keep_regions: give the regions as well, as float16.
    progress: shows a bar with speed and remaining time.

  Yields:
    Pieces; together they are the whole source.

  Raises:
    InputError: the source is empty, or an embedding is not finite.
    ValueError: the batch size is not positive.
  """
  if batch_size < 1:
    raise ValueError(f'{batch_size=} must be positive')
  if len(source) == 0:
    raise InputError('there is no image to embed: name a source with images')
  mesh = local_mesh() if mesh is None else mesh
  size = _batch_size(len(source), batch_size, mesh.size)
  variables, context = copy_to_all((embedder.variables, context), mesh)
  waiting: tuple[int, Any, Any] | None = None
  with progress_bar(
    len(source), desc='embed', unit='image', disable=not progress
  ) as bar:
    for start, images in _read(source, size):
      padded = jax.tree.map(functools.partial(_pad, size=size), images)
      result = embedder.compiled(
        variables, spread(padded, mesh), context, keep_regions=keep_regions
      )
      if waiting is not None:
        yield _collect(*waiting, source.ids, bar)
      waiting = start, images, result
    if waiting is not None:
      yield _collect(*waiting, source.ids, bar)


def _batch_size(images: int, limit: int, devices: int) -> int:
  """Images of a batch: a power of two if few, always whole per device."""
  size = min(limit, 1 << (images - 1).bit_length())
  return -(-size // devices) * devices


def _read(source: Source, size: int) -> Iterator[tuple[int, Any]]:
  """The images of a source in order, `size` at a time, the last ones fewer."""

  def plan(step: int) -> np.ndarray:
    return np.arange(step * size, min((step + 1) * size, len(source)))

  steps = -(-len(source) // size)
  for batch in batches(source, plan, start=0, stop=steps):
    yield batch['step'] * size, batch['image']


def _pad(array: np.ndarray, *, size: int) -> np.ndarray:
  missing = size - len(array)
  if missing == 0:
    return array
  return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))


def _collect(
  start: int, images: Any, result: Any, ids: Sequence[str], bar: tqdm
) -> EmbeddedBatch:
  """Waits for a batch and takes the filling off."""
  count = len(jax.tree.leaves(images)[0])
  vectors = np.asarray(result[0], np.float32)[:count]
  regions = None if result[1] is None else np.asarray(result[1])[:count]
  for array in (vectors, regions):
    if array is None:
      continue
    finite = np.isfinite(array).reshape(count, -1).all(axis=1)
    if not finite.all():
      raise InputError(
        f'the embedding of image {ids[start + int(np.argmin(finite))]} is not '
        'finite: the weights are broken, or its regions exceed float16'
      )
  bar.update(count)
  return EmbeddedBatch(start, images, vectors, regions)
