"""Damage to test images, in five severities, to measure robustness.

Functions of (key, image) as in `msba_jax.data.transforms`; they take and return
uint8, so that a damaged image can take the place of a sound one anywhere. What
is measured in pixels grows with the image.

Attributes:
  SEVERITIES: 1 … 5.
  CORRUPTIONS: every corruption by its name.
  gaussian_noise: independent noise.
  gaussian_blur: a low-pass filter.
  brightness: every pixel lighter.
  contrast: every pixel nearer to the mean.
  pixelate: fewer pixels.
  occlusion: a square covered with grey.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from msba_jax.data.transforms import rectangle_mask

Image = UInt8[Array, 'height width channels']
SEVERITIES = (1, 2, 3, 4, 5)

_NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)  # standard deviation, pixels 0 … 1
_BLUR = (0.01, 0.016, 0.024, 0.036, 0.05)  # standard deviation / shorter side
_BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added, pixels 0 … 1
_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)  # factor
_PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.2)  # share of the side that is kept
_OCCLUSION = (0.05, 0.1, 0.2, 0.35, 0.5)  # share of the area


def _level(severity: int, table: tuple[float, ...]) -> float:
  if severity not in SEVERITIES:
    raise ValueError(f'{severity=} must be one of {SEVERITIES}')
  return table[severity - 1]


def _to_uint8(pixels: Float[Array, 'height width channels']) -> Image:
  return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def _blur_matrix(side: int, sigma: float) -> np.ndarray:
  """Row i holds the weights of the pixels that pixel i becomes a mean of."""
  reach = max(1, round(4 * sigma))
  offsets = np.arange(-reach, reach + 1)
  weights = np.exp(-0.5 * (offsets / sigma) ** 2)
  places = np.clip(np.arange(side)[:, None] + offsets, 0, side - 1)
  matrix = np.zeros((side, side), np.float32)
  np.add.at(matrix, (np.arange(side)[:, None], places), weights / weights.sum())
  return matrix


def gaussian_noise(key: PRNGKeyArray, image: Image, *, severity: int) -> Image:
  """Adds independent Gaussian noise.

  Args:
    key: random key.
    image: uint8.
    severity: 1 … 5.

  Returns:
    uint8 of the same shape.

  Raises:
    ValueError: there is no such severity.
  """
  noise = 255 * _level(severity, _NOISE) * jax.random.normal(key, image.shape)
  return _to_uint8(image + noise)


def gaussian_blur(key: PRNGKeyArray, image: Image, *, severity: int) -> Image:
  """Averages neighbours with Gaussian weights; edges are repeated.

  Args:
    key: not used; every corruption takes one.
    image: uint8.
    severity: 1 … 5.

  Returns:
    uint8 of the same shape.

  Raises:
    ValueError: there is no such severity.
  """
  del key
  sigma = _level(severity, _BLUR) * min(image.shape[:2])
  rows, columns = (_blur_matrix(side, sigma) for side in image.shape[:2])
  pixels = image.astype(jnp.float32)
  return _to_uint8(jnp.einsum('ij,jkc,lk->ilc', rows, pixels, columns))


def brightness(key: PRNGKeyArray, image: Image, *, severity: int) -> Image:
  """Makes every pixel lighter.

  Args:
    key: not used; every corruption takes one.
    image: uint8.
    severity: 1 … 5.

  Returns:
    uint8 of the same shape.

  Raises:
    ValueError: there is no such severity.
  """
  del key
  return _to_uint8(image + 255 * _level(severity, _BRIGHTNESS))


def contrast(key: PRNGKeyArray, image: Image, *, severity: int) -> Image:
  """Moves every pixel towards the mean of its channel.

  Args:
    key: not used; every corruption takes one.
    image: uint8.
    severity: 1 … 5.

  Returns:
    uint8 of the same shape.

  Raises:
    ValueError: there is no such severity.
  """
  del key
  pixels = image.astype(jnp.float32)
  mean = jnp.mean(pixels, axis=(0, 1), keepdims=True)
  return _to_uint8(mean + (pixels - mean) * _level(severity, _CONTRAST))


def pixelate(key: PRNGKeyArray, image: Image, *, severity: int) -> Image:
  """Keeps fewer pixels, and shows them as squares.

  Args:
    key: not used; every corruption takes one.
    image: uint8.
    severity: 1 … 5.

  Returns:
    uint8 of the same shape.

  Raises:
    ValueError: there is no such severity.
  """
  del key
  height, width, channels = image.shape
  share = _level(severity, _PIXELATE)
  small = (max(1, round(height * share)), max(1, round(width * share)))
  pixels = jax.image.resize(
    image.astype(jnp.float32), (*small, channels), 'linear', antialias=True
  )
  return _to_uint8(jax.image.resize(pixels, image.shape, 'nearest'))


def occlusion(key: PRNGKeyArray, image: Image, *, severity: int) -> Image:
  """Covers a square at a random place with middle grey.

  Args:
    key: random key.
    image: uint8.
    severity: 1 … 5.

  Returns:
    uint8 of the same shape.

  Raises:
    ValueError: there is no such severity.
  """
  share = _level(severity, _OCCLUSION)
  inside = rectangle_mask(key, image.shape[:2], (share, share), (1.0, 1.0))
  return jnp.where(inside[..., None], jnp.uint8(127), image)


CORRUPTIONS: Mapping[str, Callable[..., Array]] = MappingProxyType(
  {
    'gaussian_noise': gaussian_noise,
    'gaussian_blur': gaussian_blur,
    'brightness': brightness,
    'contrast': contrast,
    'pixelate': pixelate,
    'occlusion': occlusion,
  }
)
