"""Paints a scene: background, objects from back to front, noise.

Objects are sampled on a grid that is finer than the pixels, each in its own
bounding box, and averaged down; so edges and textures are smooth at 32 pixels
as at 256.

Attributes:
  PALETTE: colours of objects, red, green and blue from 0 to 1.
  Painting: what is painted and which object every pixel shows.
  paint: paints a scene.
"""

from __future__ import annotations

import colorsys
import functools
import math
from typing import NamedTuple

import numpy as np

from msba_jax.data.scenes import outlines
from msba_jax.data.scenes.objects import SceneObject
from msba_jax.data.scenes.templates import HUES

PALETTE = {
  'red': (0.86, 0.16, 0.18),
  'orange': (0.97, 0.52, 0.10),
  'yellow': (0.98, 0.85, 0.18),
  'green': (0.22, 0.62, 0.25),
  'teal': (0.08, 0.68, 0.70),
  'blue': (0.17, 0.33, 0.84),
  'purple': (0.49, 0.22, 0.70),
  'pink': (0.98, 0.53, 0.74),
}

_FINE = 160  # samples along the picture's side, at least
_GRID = 5  # cells of the cloudy background
_TURN = np.float32(outlines.BINS / (2 * math.pi))


class Painting(NamedTuple):
  """A painted scene.

  Attributes:
    image: uint8, (size, size, 3).
    full: Boolean, (objects, size, size); what each object covers.
    visible: Boolean, (objects, size, size); what is seen of it; disjoint.
  """

  image: np.ndarray
  full: np.ndarray
  visible: np.ndarray


class _Patch(NamedTuple):
  """An object on the pixels of its box.

  Attributes:
    rows: rows of the picture.
    columns: columns of the picture.
    cover: part of each pixel that is covered.
    paint: colour of each pixel times `cover`.
  """

  rows: slice
  columns: slice
  cover: np.ndarray
  paint: np.ndarray


def paint(
  objects: list[SceneObject],
  hue: int,
  *,
  size: int,
  noise: float,
  rng: np.random.Generator,
) -> Painting:
  """Paints a scene.

  Args:
    objects: from back to front.
    hue: of the background, an index into `HUES`.
    size: height and width in pixels.
    noise: standard deviation of a pixel's noise; white is 1.
    rng: what draws background, shades and noise.

  Returns:
    The picture and the masks.
  """
  canvas = _paint_background(hue, size, rng)
  full = np.zeros((len(objects), size, size), bool)
  for mask, thing in zip(full, objects, strict=True):
    patch = _paint_object(thing, size, float(rng.random()))
    window = canvas[patch.rows, patch.columns]
    window *= 1 - patch.cover[..., None]
    window += patch.paint
    mask[patch.rows, patch.columns] = patch.cover >= 0.5
  if noise:
    canvas += noise * rng.standard_normal(canvas.shape, np.float32)
  np.clip(canvas, 0, 1, out=canvas)
  front = np.zeros((size, size), bool)
  visible = full.copy()
  for mask in visible[::-1]:
    mask &= ~front
    front |= mask
  return Painting((255 * canvas + 0.5).astype(np.uint8), full, visible)


def _paint_background(
  hue: int, size: int, rng: np.random.Generator
) -> np.ndarray:
  """A gradient of one hue with a faint texture, float32."""
  u = rng.random(8).tolist()
  angle = 2 * math.pi * u[0]
  cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
  at = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
  along = cosine * at + sine * at[:, None]
  value = 0.86 + 0.1 * (u[1] - 0.5) + (0.12 + 0.16 * u[2]) * along
  kind = int(4 * u[3])
  if kind == 1:
    across = cosine * at[:, None] - sine * at
    value += 0.03 * np.sin(2 * math.pi * ((4 + 3 * u[4]) * across + u[5]))
  elif kind == 2:
    wave = 2 * math.pi * (4 + 2 * u[4])
    value += 0.03 * np.sin(wave * at) * np.sin(wave * at + u[5])[:, None]
  clouds = rng.standard_normal((_GRID, _GRID), np.float32)
  if kind == 3:
    upsample = _upsample(size)
    value += 0.035 * (upsample @ clouds @ upsample.T)
  shade = (hue + 0.5 * (u[6] - 0.5)) / len(HUES)
  pure = np.array(colorsys.hsv_to_rgb(shade, 1, 1), np.float32)
  saturation = 0.22 + 0.16 * u[7] - 0.12 * along
  colour = 1 - saturation[..., None] * (1 - pure)
  return (value[..., None] * colour).astype(np.float32)


@functools.cache
def _upsample(size: int) -> np.ndarray:
  """Smooth interpolation from `_GRID` to `size` points, (size, _GRID)."""
  at = np.linspace(0, _GRID - 1, size)
  distance = np.abs(at[:, None] - np.arange(_GRID))
  weights = np.where(distance < 1, 0.5 + 0.5 * np.cos(math.pi * distance), 0)
  return weights.astype(np.float32)


def _paint_object(thing: SceneObject, size: int, shade: float) -> _Patch:
  """Fills the outline of an object on a fine grid and averages it down."""
  fine = max(4, math.ceil(_FINE / size))
  rows = _span(thing.y, thing.reach, size)
  columns = _span(thing.x, thing.reach, size)
  y = _samples(rows, size, fine) - np.float32(thing.y)
  x = _samples(columns, size, fine) - np.float32(thing.x)
  cosine = np.float32(math.cos(thing.angle) / thing.radius)
  sine = np.float32(math.sin(thing.angle) / thing.radius)
  along = cosine * x + sine * y[:, None]
  across = cosine * y[:, None] - sine * x
  turn = np.arctan2(across, along) * _TURN + np.float32(outlines.BINS / 2)
  bins = np.minimum(turn.astype(np.int32), outlines.BINS - 1)
  limit = outlines.radius_table(thing.shape)[bins]
  part = np.sqrt(along * along + across * across) / limit
  inside = part <= 1
  inner = part <= 1 - outlines.BORDER
  if thing.shape == 'ring':
    inside &= part >= outlines.HOLE
    inner &= part >= outlines.HOLE + outlines.BORDER
  accent = inner & _texture(thing.texture, along, across)
  cover, filled, dark = _average((inside, inner, accent), fine)
  colour = np.array(PALETTE[thing.colour], np.float32)
  light = (0.93 + 0.14 * shade) - 0.10 * (
    _average_line(across, fine) / np.float32(outlines.REACH[thing.shape])
  )
  paint_ = (filled - dark)[..., None] * colour + dark[..., None] * (
    _accent_colour(thing.colour)
  )
  paint_ = paint_ * light[..., None]
  paint_ += (cover - filled)[..., None] * (0.42 * colour)
  return _Patch(rows, columns, cover, paint_)


def _span(centre: float, reach: float, size: int) -> slice:
  low = max(0, math.floor((centre - reach) * size))
  return slice(low, min(size, math.ceil((centre + reach) * size)))


def _samples(span: slice, size: int, fine: int) -> np.ndarray:
  at = np.arange(span.start * fine, span.stop * fine, dtype=np.float32)
  return (at + np.float32(0.5)) / np.float32(size * fine)


def _texture(name: str, along: np.ndarray, across: np.ndarray) -> np.ndarray:
  """Where the second colour of an object is."""
  if name == 'plain':
    return np.zeros(along.shape, bool)
  if name == 'striped':
    return (along * np.float32(1.6)) % 1 < 0.5
  if name == 'checkered':
    cells = np.floor(along * 1.7 + 0.5) + np.floor(across * 1.7 + 0.5)
    return cells % 2 == 0
  u = (along * 1.6) % 1 - np.float32(0.5)
  v = (across * 1.6) % 1 - np.float32(0.5)
  return u * u + v * v < 0.085


def _accent_colour(colour: str) -> np.ndarray:
  """A clear contrast: lighter on dark colours, darker on light ones."""
  rgb = np.array(PALETTE[colour], np.float32)
  luminance = float(rgb @ np.array([0.3, 0.59, 0.11], np.float32))
  return 0.45 * rgb + 0.55 if luminance < 0.55 else 0.55 * rgb


def _average(
  masks: tuple[np.ndarray, np.ndarray, np.ndarray], fine: int
) -> list[np.ndarray]:
  """Part of each pixel that is True, of three masks, float32."""
  # One pass over the samples counts all three: ten bits for each.
  counts = masks[0].astype(np.uint32)
  counts += masks[1].astype(np.uint32) << 10
  counts += masks[2].astype(np.uint32) << 20
  height, width = counts.shape[0] // fine, counts.shape[1] // fine
  blocks = counts.reshape(height * fine, width, fine).sum(2, np.uint32)
  blocks = blocks.reshape(height, fine, width).sum(1, np.uint32)
  scale = np.float32(1 / fine**2)
  return [
    ((blocks >> shift) & 1023).astype(np.float32) * scale
    for shift in (0, 10, 20)
  ]


def _average_line(values: np.ndarray, fine: int) -> np.ndarray:
  """A smooth function at the middle of each pixel."""
  return values[fine // 2 :: fine, fine // 2 :: fine]
