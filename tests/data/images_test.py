"""Tests of `msba_jax.data.images`."""

import io
import struct
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from msba_jax.data import images
from msba_jax.data.errors import InputError


def encoded(array, kind='PNG', **options):
  file = io.BytesIO()
  image = array if isinstance(array, Image.Image) else Image.fromarray(array)
  image.save(file, kind, **options)
  return file.getvalue()


def decoded(data, size=8, name='x', **options):
  return images.decode_image(data, name=name, size=size, **options)


def png_header(width, height):
  """A PNG that claims a size and has no pixels."""

  def chunk(kind, data):
    check = zlib.crc32(kind + data)
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', check)

  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IEND', b'')


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'PPM', 'TIFF'])
def test_an_image_of_the_right_size_comes_back_as_it_is(rng, kind):
  array = rng.integers(0, 256, (8, 8, 3), np.uint8)
  result = decoded(encoded(array, kind))
  assert result.dtype == np.uint8
  np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize('kind', ['JPEG', 'WEBP', 'GIF'])
def test_lossy_formats_come_close(kind):
  ramp = np.linspace(0, 255, 32).astype(np.uint8)
  array = np.broadcast_to(ramp[:, None, None], (32, 32, 3)).copy()
  result = decoded(encoded(array, kind), size=32)
  assert np.abs(result.astype(int) - array).mean() < 4


def test_the_central_square_is_taken():
  array = np.zeros((8, 24, 3), np.uint8)
  array[:, 8:16] = 200
  np.testing.assert_array_equal(decoded(encoded(array)), array[:, 8:16])


@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_scaling_down_averages(kind):
  array = np.zeros((128, 128, 3), np.uint8)
  array[::2] = 255  # a nearest neighbour would be black or white
  result = decoded(encoded(array, kind), size=8)
  assert np.abs(result.astype(int) - 127).max() < 12


@hypothesis.given(
  width=st.integers(1, 40), height=st.integers(1, 40), size=st.integers(1, 20)
)
def test_every_shape_becomes_the_square(width, height, size):
  array = np.full((height, width, 3), 90, np.uint8)
  result = decoded(encoded(array), size=size)
  assert result.shape == (size, size, 3)
  np.testing.assert_array_equal(result, 90)


def test_the_camera_orientation_is_applied(rng):
  array = rng.integers(0, 256, (8, 8, 3), np.uint8)
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90° clockwise
  result = decoded(encoded(array, exif=exif))
  np.testing.assert_array_equal(result, np.rot90(array, -1))


def test_all_modes_become_rgb(rng):
  grey = rng.integers(0, 256, (8, 8), np.uint8)
  rgb = np.stack([grey] * 3, axis=-1)
  deep = grey.astype(np.uint16) * 257
  palette = Image.fromarray(grey).convert('P')
  alpha = np.concatenate([rgb, np.full((8, 8, 1), 255, np.uint8)], axis=-1)
  for array in (grey, deep, palette, alpha):
    np.testing.assert_array_equal(decoded(encoded(array)), rgb)
  cmyk = Image.fromarray(rgb).convert('CMYK')
  np.testing.assert_allclose(decoded(encoded(cmyk, 'TIFF')), rgb, atol=2)


def test_what_is_transparent_shows_white():
  array = np.zeros((8, 8, 4), np.uint8)
  array[:4, :, 3] = 255
  result = decoded(encoded(array))
  assert (result[:4] == 0).all()
  assert (result[4:] == 255).all()
  palette = Image.new('P', (8, 8), 1)
  palette.putpalette([10, 20, 30, 40, 50, 60])
  assert (decoded(encoded(palette, transparency=1)) == 255).all()


def test_floating_point_pixels_are_refused():
  with pytest.raises(InputError, match=r'x is broken .*mode F'):
    decoded(encoded(Image.new('F', (8, 8)), 'TIFF'))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('share', [0.0, 0.3, 0.7])
def test_a_truncated_image_names_its_file(rng, kind, share):
  data = encoded(rng.integers(0, 256, (32, 32, 3), np.uint8), kind)
  with pytest.raises(InputError, match=r'birds/owl 7 is .*(replace|remove)'):
    decoded(data[: int(share * len(data))], name='birds/owl 7')


@pytest.mark.parametrize(
  'data', [b'', b'not an image', b'\xff\xd8\xff', b'%PDF-1.4', b'<svg/>']
)
def test_other_things_name_their_file(data):
  with pytest.raises(InputError, match=r'owl\.jpg is'):
    decoded(data, name='owl.jpg')


@hypothesis.given(
  flips=st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1
  ),
  kind=st.sampled_from(['JPEG', 'PNG', 'GIF', 'TIFF', 'WEBP', 'BMP']),
)
def test_flipped_bits_give_an_error_or_an_image(flips, kind):
  array = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
  data = bytearray(encoded(array, kind))
  for place, bits in flips:
    data[place % len(data)] ^= bits
  try:
    shape = decoded(bytes(data)).shape
  except InputError:
    return
  assert shape == (8, 8, 3)


def test_flipped_bits_in_a_png_are_seen(rng):
  data = bytearray(encoded(rng.integers(0, 256, (32, 32, 3), np.uint8)))
  data[len(data) // 2] ^= 4
  with pytest.raises(InputError, match='x is broken'):
    decoded(bytes(data))


@pytest.mark.parametrize('side', [9_000, 20_000, 60_000])
def test_a_huge_image_is_refused_before_decoding(side):
  with pytest.raises(InputError, match=r'x (is too large|has 9000×9000)'):
    decoded(png_header(side, side))


def test_the_limit_of_pixels_is_exact():
  data = encoded(np.zeros((8, 9, 3), np.uint8))
  assert decoded(data, max_pixels=72).shape == (8, 8, 3)
  with pytest.raises(InputError, match='x has 9×8 pixels, more than 71'):
    decoded(data, max_pixels=71)


def test_a_lying_extension_is_refused():
  data = encoded(np.zeros((8, 8, 3), np.uint8))
  assert decoded(data, name='a.PNG').shape == (8, 8, 3)
  with pytest.raises(InputError, match=r'a\.jpg holds PNG data.*\.png'):
    decoded(data, name='a.jpg')


def test_the_size_must_be_positive():
  with pytest.raises(ValueError, match='size=0'):
    decoded(b'', size=0)
