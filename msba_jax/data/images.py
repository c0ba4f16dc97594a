"""Encoded bytes to an RGB array, safely.

The bytes come from strangers: they may be cut off, be something else than an
image, claim gigantic dimensions, or lie about their format. Each of these ends
as an `InputError` that names the file; nothing is guessed or half-decoded.
Only the formats below are tried, dimensions are checked before pixels are
decoded, and truncated images are never completed with grey.

What decoding cannot see: JPEG has no check sum, so flipped bits in its data can
decode without complaint to another picture. (In a zip the CRC of the entry is
verified, so there they are seen; for loose files keep a list of hashes beside
the data.)

Attributes:
  FORMATS: the formats that are read, with their extensions.
  Interpolation: how images are resized.
  MAX_PIXELS: images that claim more pixels are refused before decoding.
  MAX_BYTES: files that are larger are refused before they are read.
  is_image_name: whether a file name has one of the extensions.
  decode_image: bytes to a square uint8 array.
"""

from __future__ import annotations

import io
import os
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from msba_jax.data.errors import InputError

FORMATS: dict[str, tuple[str, ...]] = {
  'BMP': ('.bmp',),
  'GIF': ('.gif',),
  'JPEG': ('.jpg', '.jpeg'),
  'MPO': ('.jpg', '.jpeg'),
  'PNG': ('.png',),
  'PPM': ('.ppm', '.pgm', '.pbm'),
  'TIFF': ('.tif', '.tiff'),
  'WEBP': ('.webp',),
}
EXTENSIONS = frozenset(e for group in FORMATS.values() for e in group)
_TRIED = tuple(kind for kind in FORMATS if kind != 'MPO')  # JPEG finds MPO
MAX_PIXELS = 64_000_000
MAX_BYTES = 128 * 2**20


Interpolation = Literal['bilinear', 'bicubic']
"""The filter of the resizing; both are antialiased."""

_FILTERS = {
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
}


def is_image_name(name: str) -> bool:
  """Whether the extension of a file name promises an image that we read.

  Args:
    name: a file name or path.

  Returns:
    True for the extensions of `FORMATS`, in any case.

  Example:
    >>> is_image_name('a/b.JPEG'), is_image_name('boxes.csv')
    (True, False)
  """
  return os.path.splitext(name)[1].lower() in EXTENSIONS


def decode_image(
  data: bytes,
  *,
  name: str,
  size: int,
  interpolation: Interpolation = 'bicubic',
  max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
  """Decodes one image, crops its central square and resizes that.

  This is "shorter side to `size`, then centre crop" in one pass, by an
  antialiased filter. The orientation that a camera noted is applied;
  palettes, grey, CMYK and 16 bits become 8-bit RGB; what is transparent shows
  white; of an animation the first frame is taken.

  Args:
    data: the encoded image.
    name: what errors call it; if it has one of the extensions of `FORMATS`,
      the content must be of that format.
    size: side of the result in pixels.
    interpolation: the filter.
    max_pixels: refuse images that claim more pixels than this.

  Returns:
    uint8, (size, size, 3).

  Raises:
    InputError: the bytes are no image, another format than the name says,
      broken, or too large.
    ValueError: `size` is not positive.
  """
  if size < 1:
    raise ValueError(f'{size=} must be positive')
  try:
    with _open(data, name, max_pixels) as image:
      rgb = _to_rgb(_oriented(image, size))
      return np.asarray(_square(rgb, size, _FILTERS[interpolation]))
  except InputError:
    raise
  except Image.UnidentifiedImageError as error:
    raise InputError(
      f'{name} is no image of a known format ({", ".join(FORMATS)}): replace '
      'or remove it'
    ) from error
  except (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
  ) as error:
    raise InputError(
      f'{name} is too large ({error}): scale it down or remove it'
    ) from error
  except MemoryError:
    raise
  except Exception as error:  # Decoders raise nearly anything on broken bytes.
    reason = f'{type(error).__name__}: {error}' if str(error) else repr(error)
    raise InputError(
      f'{name} is broken ({reason}): replace or remove it'
    ) from error


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
  """Reads the header only, and refuses what must not be decoded."""
  image = Image.open(io.BytesIO(data), formats=_TRIED)
  width, height = image.size
  if width * height > max_pixels:
    raise InputError(
      f'{name} has {width}×{height} pixels, more than {max_pixels:,}: scale '
      'it down or remove it'
    )
  kind = str(image.format)
  if is_image_name(name):
    extension = os.path.splitext(name)[1].lower()
    if extension not in FORMATS[kind]:
      raise InputError(
        f'{name} holds {kind} data, not what its extension says: rename it '
        f'to {FORMATS[kind][0]} or replace it'
      )
  if kind == 'PNG':  # Decoding alone skips the check sums of the pixel data.
    image.verify()
    image = Image.open(io.BytesIO(data), formats=('PNG',))
  return image


def _oriented(image: Image.Image, size: int) -> Image.Image:
  """Decodes, and turns the picture as the camera was held."""
  if image.format == 'JPEG':  # Skip frequencies that resizing would remove.
    image.draft(None, (2 * size, 2 * size))
  image.load()
  ImageOps.exif_transpose(image, in_place=True)
  return image


def _to_rgb(image: Image.Image) -> Image.Image:
  """Any mode to 8-bit RGB; transparency over white."""
  if image.mode == 'F' or (
    image.mode == 'I' and np.max(np.asarray(image)) > 65535
  ):
    raise ValueError(f'pixels of mode {image.mode} have no known range')
  if image.mode.startswith('I'):
    deep = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    return Image.fromarray(((deep + 128) // 257).astype(np.uint8)).convert(
      'RGB'
    )
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert('RGB')
  return image if image.mode == 'RGB' else image.convert('RGB')


def _square(
  image: Image.Image, size: int, resample: Image.Resampling
) -> Image.Image:
  """The central square, resized."""
  width, height = image.size
  if width == height == size:
    return image
  side = min(width, height)
  left, top = (width - side) / 2, (height - side) / 2
  return image.resize(
    (size, size),
    resample,
    box=(left, top, left + side, top + side),
    reducing_gap=3.0,
  )
