"""The files of an index, written as the embeddings come.

Plain writes, no memory map: a full disk is an error here, and a map would end
the process with a bus error.

Attributes:
  RowWriter: writes a `.npy` file whose number of rows is known.
  write_arrays: writes vectors, thumbnails and regions.
  write_names: writes ids, labels and names of classes.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from msba_jax.data.atomic import write_json
from msba_jax.data.source import Source
from msba_jax.retrieval.embed import EmbeddedBatch
from msba_jax.retrieval.thumbnails import ThumbnailWriter

__all__ = ['RowWriter', 'write_arrays', 'write_names']


class RowWriter:
  """Writes rows in order, until `close`.

  Args:
    path: the file.
    rows: how many rows will be written in all.
  """

  def __init__(self, path: Path, rows: int):
    self._file = path.open('wb')
    self._rows = rows
    self._written = 0
    self._kind: tuple[np.dtype, tuple[int, ...]] | None = None

  def append(self, rows: np.ndarray) -> None:
    """Writes further rows, of the type and shape of the first ones.

    Raises:
      ValueError: the rows differ from the first ones, or are too many.
    """
    kind = rows.dtype, rows.shape[1:]
    if self._kind is None:
      self._kind = kind
      header = {
        'descr': np.lib.format.dtype_to_descr(rows.dtype),
        'fortran_order': False,
        'shape': (self._rows, *rows.shape[1:]),
      }
      np.lib.format.write_array_header_1_0(self._file, header)
    self._written += len(rows)
    if kind != self._kind or self._written > self._rows:
      raise ValueError(
        f'rows {kind} after {self._kind}, {self._written} of {self._rows}'
      )
    self._file.write(np.ascontiguousarray(rows).data)

  def close(self) -> None:
    """Ends the file."""
    self._file.close()


def write_arrays(
  directory: Path, pieces: Iterable[EmbeddedBatch], *, number: int, side: int
) -> tuple[int, ...]:
  """Writes vectors and thumbnails, and regions where the pieces have them.

  Args:
    directory: where to write.
    pieces: the collection, in order.
    number: how many images there are in all.
    side: the longer side of a thumbnail.

  Returns:
    The shape of an image.

  Raises:
    TypeError: the pieces hold features, not pictures.
  """
  shape: tuple[int, ...] = ()
  with contextlib.ExitStack() as files:
    vectors = RowWriter(directory / 'vectors.npy', number)
    files.callback(vectors.close)
    thumbnails = ThumbnailWriter(directory, side=side)
    files.callback(thumbnails.close)
    regions = None
    for piece in pieces:
      vectors.append(piece.vectors)
      if piece.regions is not None:
        if regions is None:
          regions = RowWriter(directory / 'regions.npy', number)
          files.callback(regions.close)
        regions.append(piece.regions)
      if piece.images.dtype != np.uint8:
        raise TypeError(
          f'an index is made of pictures, not of {piece.images.dtype}'
        )
      for image in piece.images:
        thumbnails.append(image)
      shape = piece.images.shape[1:]
  return shape


def write_names(directory: Path, source: Source) -> None:
  """Writes the ids, and labels and class names where there are classes.

  Args:
    directory: where to write.
    source: what is indexed.
  """
  write_json(directory / 'ids.json', list(source.ids))
  if source.class_names:
    np.save(directory / 'labels.npy', np.asarray(source.labels, np.int32))
    write_json(directory / 'classes.json', list(source.class_names))
