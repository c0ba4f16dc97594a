"""Augmentation of single images, as pure functions of a key and an array.

Every function takes `(key, image)` first; the rest is bound by
`functools.partial`, and `compose` makes one function of several. They run on
the device, inside the compiled step, under `jax.vmap`. Pixels are 0 … 255 all
the way; `normalize_image` comes last. Flips and hue change the label of scenes.

Attributes:
  Augment: the type of an augmentation.
  compose: one augmentation after the other.
  random_flip: mirrors left and right.
  random_crop: shifts by a few pixels.
  random_resized_crop: a part of the image at another scale.
  color_jitter: brightness, contrast, saturation, hue.
  random_erasing: covers a rectangle.
  normalize_image: pixels to zero mean and unit variance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

Image = Real[Array, 'height width channels']
Augment = Callable[[PRNGKeyArray, Array], Array]

# Rec. 601 luma, and the chroma plane in which hue is an angle (YIQ).
_LUMA = (0.299, 0.587, 0.114)
_CHROMA = ((0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
_TO_RGB = np.linalg.inv(np.array((_LUMA, *_CHROMA))).T.astype(np.float32)


def compose(*augments: Augment) -> Augment:
  """One augmentation after the other, each with a key of its own.

  Args:
    *augments: functions of (key, image), in their order.

  Returns:
    A function of (key, image).

  Example:
    >>> from functools import partial
    >>> augment = compose(random_flip, partial(random_crop, padding=2))
    >>> images = jnp.zeros((3, 8, 8, 3), jnp.uint8)
    >>> jax.vmap(augment)(jax.random.split(jax.random.key(0), 3), images).shape
    (3, 8, 8, 3)
  """

  def augment(key: PRNGKeyArray, image: Array) -> Array:
    for i, function in enumerate(augments):
      image = function(jax.random.fold_in(key, i), image)
    return image

  return augment


def random_flip(
  key: PRNGKeyArray, image: Image, *, probability: float = 0.5
) -> Image:
  """Mirrors left and right.

  Args:
    key: random key.
    image: any dtype.
    probability: of mirroring.

  Returns:
    An image of the same shape and dtype.
  """
  flip = jax.random.bernoulli(key, probability)
  return jnp.where(flip, image[:, ::-1], image)


def random_crop(
  key: PRNGKeyArray,
  image: Image,
  *,
  padding: int = 4,
  mode: Literal['reflect', 'edge', 'constant'] = 'reflect',
) -> Image:
  """Pads all sides and cuts out a window of the original size.

  Args:
    key: random key.
    image: any dtype.
    padding: largest shift in pixels; `reflect` wants less than a side.
    mode: what the padding shows, see `jnp.pad`.

  Returns:
    An image of the same shape and dtype.

  Raises:
    ValueError: the padding is negative or too large to reflect.
  """
  side = min(image.shape[:2])
  if padding < 0 or (mode == 'reflect' and padding >= side):
    raise ValueError(f'{padding=} must be between 0 and {side - 1}')
  pads = ((padding, padding), (padding, padding), (0, 0))
  padded = jnp.pad(image, pads, mode=mode)
  y, x = jax.random.randint(key, (2,), 0, 2 * padding + 1)
  return jax.lax.dynamic_slice(padded, (y, x, jnp.zeros_like(y)), image.shape)


def random_resized_crop(
  key: PRNGKeyArray,
  image: Image,
  *,
  area: tuple[float, float] = (0.25, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Float[Array, 'height width channels']:
  """Cuts out a rectangle and resizes it to the original size, antialiased.

  Args:
    key: random key.
    image: any dtype.
    area: range of the rectangle's share of the image, uniform.
    ratio: range of width over height, log-uniform, before it is clipped to
      the image.

  Returns:
    A float32 image of the same shape.

  Raises:
    ValueError: a range is empty or outside (0, 1] for `area`.
  """
  if not 0 < area[0] <= area[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
    raise ValueError(f'{area=} must lie in (0, 1] and {ratio=} be positive')
  height, width, _ = image.shape
  sides, corner = _rectangle(key, (height, width), area, ratio)
  scale = jnp.asarray([height, width], jnp.float32) / sides
  resized = jax.image.scale_and_translate(
    image.astype(jnp.float32),
    image.shape,
    (0, 1),
    scale,
    -corner * scale,
    'linear',
    antialias=True,
  )
  return jnp.clip(resized, 0, 255)


def color_jitter(
  key: PRNGKeyArray,
  image: Image,
  *,
  brightness: float = 0.2,
  contrast: float = 0.2,
  saturation: float = 0.2,
  hue: float = 0.0,
) -> Float[Array, 'height width channels']:
  """Changes colours by random factors.

  The first three factors are uniform in 1 ± the argument: brightness scales
  pixels, contrast their distance from the mean luma, saturation that from
  their own luma. Hue turns the chroma plane (YIQ) by a share of a full circle,
  uniform in ± the argument.

  Args:
    key: random key.
    image: RGB, any dtype.
    brightness: largest change of the factor, as the next two.
    contrast: see above.
    saturation: see above.
    hue: largest turn, in full circles.

  Returns:
    A float32 image of the same shape, clipped to 0 … 255.

  Raises:
    ValueError: an argument is negative, or the image is not RGB.
  """
  limits = (brightness, contrast, saturation, hue)
  if min(limits) < 0:
    raise ValueError(f'{limits=} must not be negative')
  if image.shape[-1] != 3:
    raise ValueError(f'{image.shape=} must have three channels')
  draws = jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)
  change = draws * jnp.asarray(limits, jnp.float32)
  pixels = image.astype(jnp.float32) * (1 + change[0])
  luma = jnp.asarray(_LUMA, jnp.float32)
  mean = jnp.mean(pixels @ luma)
  pixels = mean + (pixels - mean) * (1 + change[1])
  grey = (pixels @ luma)[..., None]
  chroma = pixels @ jnp.asarray(_CHROMA, jnp.float32).T
  cos, sin = jnp.cos(2 * jnp.pi * change[3]), jnp.sin(2 * jnp.pi * change[3])
  turned = chroma @ jnp.stack([jnp.stack([cos, sin]), jnp.stack([-sin, cos])])
  colors = jnp.concatenate([grey, turned * (1 + change[2])], axis=-1) @ _TO_RGB
  return jnp.clip(colors, 0, 255)


def random_erasing(
  key: PRNGKeyArray,
  image: Image,
  *,
  probability: float = 0.25,
  area: tuple[float, float] = (0.02, 0.2),
  ratio: tuple[float, float] = (0.3, 3.3),
  value: float = 127.0,
) -> Image:
  """Covers a random rectangle with one value; `ratio=(1, 1)` is Cutout.

  Args:
    key: random key.
    image: any dtype.
    probability: of covering anything.
    area: range of the rectangle's share of the image.
    ratio: range of width over height, log-uniform.
    value: the cover.

  Returns:
    An image of the same shape and dtype.

  Raises:
    ValueError: a range is empty or outside (0, 1] for `area`.

  Source:
    Random Erasing Data Augmentation, 2017, arXiv 1708.04896.
  """
  if not 0 < area[0] <= area[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
    raise ValueError(f'{area=} must lie in (0, 1] and {ratio=} be positive')
  key_rectangle, key_apply = jax.random.split(key)
  inside = rectangle_mask(key_rectangle, image.shape[:2], area, ratio)
  inside &= jax.random.bernoulli(key_apply, probability)
  return jnp.where(inside[..., None], jnp.asarray(value, image.dtype), image)


def rectangle_mask(
  key: PRNGKeyArray,
  shape: Sequence[int],
  area: tuple[float, float],
  ratio: tuple[float, float],
) -> Array:
  """A random rectangle inside an image, as a Boolean mask.

  Args:
    key: random key.
    shape: (height, width).
    area: range of its share of the image.
    ratio: range of width over height, log-uniform.

  Returns:
    (height, width), True inside.
  """
  sides, corner = _rectangle(key, shape, area, ratio)
  rows = jnp.arange(shape[0])[:, None] + 0.5 - corner[0]
  columns = jnp.arange(shape[1])[None, :] + 0.5 - corner[1]
  in_rows = (rows >= 0) & (rows < sides[0])
  return in_rows & ((columns >= 0) & (columns < sides[1]))


def normalize_image(
  images: Real[Array, '*batch height width channels'],
  *,
  mean: Sequence[float],
  std: Sequence[float],
) -> Float[Array, '*batch height width channels']:
  """Pixels 0 … 255 to (x / 255 − mean) / std per channel.

  Args:
    images: one image or a batch, any dtype.
    mean: per channel, for pixels scaled to 0 … 1.
    std: per channel, positive.

  Returns:
    float32 of the same shape.

  Raises:
    ValueError: there is not one positive `std` and one `mean` per channel.

  Example:
    >>> pixels = jnp.full((1, 1, 1), 255, jnp.uint8)
    >>> float(normalize_image(pixels, mean=[0.5], std=[0.25])[0, 0, 0])
    2.0
  """
  channels = images.shape[-1]
  if len(mean) != channels or len(std) != channels or min(std) <= 0:
    raise ValueError(f'{mean=}, {std=} must have {channels=} numbers, std > 0')
  shape = (1,) * (images.ndim - 1) + (channels,)
  offset = jnp.asarray(mean, jnp.float32).reshape(shape)
  scale = jnp.asarray(std, jnp.float32).reshape(shape)
  return (images.astype(jnp.float32) / 255 - offset) / scale


def _rectangle(
  key: PRNGKeyArray,
  shape: Sequence[int],
  area: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[Array, Array]:
  """Sides (height, width) and upper left corner of a random rectangle."""
  key_area, key_ratio, key_corner = jax.random.split(key, 3)
  size = jnp.asarray(shape, jnp.float32)
  pixels = size[0] * size[1]
  pixels *= jax.random.uniform(key_area, (), minval=area[0], maxval=area[1])
  low, high = jnp.log(ratio[0]), jnp.log(ratio[1])
  aspect = jnp.exp(jax.random.uniform(key_ratio, (), minval=low, maxval=high))
  sides = jnp.sqrt(pixels * jnp.stack([1 / aspect, aspect]))
  sides = jnp.minimum(sides, size)
  corner = jax.random.uniform(key_corner, (2,)) * (size - sides)
  return sides, corner
