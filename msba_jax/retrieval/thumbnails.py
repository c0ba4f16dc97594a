"""Small pictures of a collection, one after the other in one file.

Attributes:
  BYTES, OFFSETS: the two files, in the directory of an index.
  ThumbnailWriter: appends pictures.
  Thumbnails: reads them.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from jaxtyping import UInt8
from PIL import Image

__all__ = ['BYTES', 'OFFSETS', 'ThumbnailWriter', 'Thumbnails']

BYTES = 'thumbnails.bin'
OFFSETS = 'thumbnails.npy'


class ThumbnailWriter:
  """Appends JPEG pictures to `thumbnails.bin`; `close` writes the offsets.

  Args:
    directory: where the two files are written.
    side: the longer side of a picture is at most this many pixels.
  """

  def __init__(self, directory: Path, *, side: int):
    self._directory = directory
    self._side = side
    self._offsets = [0]
    self._file = (directory / BYTES).open('wb')

  def append(self, image: UInt8[np.ndarray, 'height width 3']) -> None:
    """Appends one image, made smaller if it is larger than the side."""
    picture = Image.fromarray(image)
    picture.thumbnail((self._side, self._side))
    encoded = io.BytesIO()
    picture.save(encoded, 'JPEG', quality=90)
    self._file.write(encoded.getvalue())
    self._offsets.append(self._offsets[-1] + encoded.tell())

  def close(self) -> None:
    """Ends both files."""
    self._file.close()
    np.save(self._directory / OFFSETS, np.asarray(self._offsets, np.int64))


class Thumbnails(Sequence[bytes]):
  """The pictures of a directory, as JPEG bytes.

  Args:
    directory: where `ThumbnailWriter` wrote.
  """

  def __init__(self, directory: Path):
    self._offsets = np.load(directory / OFFSETS)
    self._bytes = np.memmap(directory / BYTES, np.uint8, 'r')

  def __len__(self) -> int:
    return len(self._offsets) - 1

  @overload
  def __getitem__(self, index: int) -> bytes: ...

  @overload
  def __getitem__(self, index: slice) -> list[bytes]: ...

  def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    if not -len(self) <= index < len(self):
      raise IndexError(f'{index=} of {len(self)} thumbnails')
    start, stop = self._offsets[index % len(self) :][:2]
    return self._bytes[start:stop].tobytes()
