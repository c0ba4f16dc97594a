r"""Pictures warped in a known way: correspondence without annotation.

Attributes:
  WarpedPair: a picture, its warp, and the same points in both.
  warped_pair: makes one.
  corner_points: points of a picture that can be told from their surroundings.
  perspective: a random warp as a matrix.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8
from PIL import Image

__all__ = ['WarpedPair', 'corner_points', 'perspective', 'warped_pair']

# What a warp uncovers is grey; half the side of the window of a corner.
_GREY, _REACH = (128, 128, 128), 2


class WarpedPair(NamedTuple):
  """A picture, its warp, and the same points in both.

  Attributes:
    source: the picture.
    target: the picture, warped.
    source_points: (row, column) in pixels, from the upper left corner.
    target_points: where they are after the warp.
    visible: False where a point lies outside of the target.
  """

  source: UInt8[np.ndarray, 'height width 3']
  target: UInt8[np.ndarray, 'height width 3']
  source_points: Float32[np.ndarray, 'p 2']
  target_points: Float32[np.ndarray, 'p 2']
  visible: Bool[np.ndarray, ' p']


def warped_pair(
  image: UInt8[np.ndarray, 'height width 3'],
  *,
  rng: np.random.Generator,
  cells: int = 5,
  rotation: float = 30.0,
  zoom: float = 1.25,
  shift: float = 0.1,
  tilt: float = 0.15,
) -> WarpedPair:
  """Warps a picture at random and follows its corners.

  Args:
    image: RGB.
    rng: of the warp.
    cells: points are looked for in so many rows and columns, one in each.
    rotation: see `perspective`.
    zoom: likewise.
    shift: likewise.
    tilt: likewise.

  Returns:
    The pair, with cells² points.

  Raises:
    ValueError: the picture has fewer pixels a side than cells.
  """
  height, width = image.shape[:2]
  matrix = perspective(
    (height, width),
    rng=rng,
    rotation=rotation,
    zoom=zoom,
    shift=shift,
    tilt=tilt,
  )
  # Pillow asks, for each pixel of the target, where it is in the source.
  back = np.linalg.inv(matrix)
  back /= back[2, 2]
  target = Image.fromarray(np.ascontiguousarray(image)).transform(
    (width, height),
    Image.Transform.PERSPECTIVE,
    back.ravel()[:8].tolist(),
    Image.Resampling.BICUBIC,
    fillcolor=_GREY,
  )
  points = corner_points(image, cells=cells)
  moved = np.c_[points[:, ::-1], np.ones(len(points))] @ matrix.T
  goals = (moved[:, :2] / moved[:, 2:])[:, ::-1]
  inside = (goals >= 0) & (goals < (height, width)) & (moved[:, 2:] > 0)
  return WarpedPair(
    image,
    np.asarray(target),
    points.astype(np.float32),
    goals.astype(np.float32),
    inside.all(axis=1),
  )


def perspective(
  size: tuple[int, int],
  *,
  rng: np.random.Generator,
  rotation: float = 30.0,
  zoom: float = 1.25,
  shift: float = 0.1,
  tilt: float = 0.15,
) -> Float64[np.ndarray, '3 3']:
  """A random warp: rotation, zoom and shift of the plane, seen from aside.

  Args:
    size: height and width of the picture, in pixels.
    rng: draws each of them uniformly, the zoom in its logarithm.
    rotation: largest angle around the middle, in degrees.
    zoom: largest factor; the smallest is its inverse.
    shift: largest distance, as a share of each side.
    tilt: how much the horizon changes the scale between the middle of the
      picture and the end of its longer side, at most; below 0.5.

  Returns:
    A matrix that takes (column, row, 1) of a point in pixels to its place
    after the warp, times its last entry.

  Raises:
    ValueError: the zoom is below 1 or the tilt not in [0, 0.5).
  """
  if zoom < 1 or not 0 <= tilt < 0.5:
    raise ValueError(f'{zoom=} must be at least 1 and {tilt=} in [0, 0.5)')
  height, width = size
  middle = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1.0]])
  angle = np.deg2rad(rng.uniform(-rotation, rotation))
  factor = zoom ** rng.uniform(-1, 1)
  cosine, sine = factor * np.cos(angle), factor * np.sin(angle)
  dx, dy = rng.uniform(-shift, shift, 2) * (width, height)
  gx, gy = rng.uniform(-tilt, tilt, 2) / max(size)
  plane = np.array([[cosine, -sine, dx], [sine, cosine, dy], [gx, gy, 1.0]])
  return middle @ plane @ np.linalg.inv(middle)


def corner_points(
  image: UInt8[np.ndarray, 'height width 3'], *, cells: int
) -> Float64[np.ndarray, 'p 2']:
  """In each cell of a picture, the pixel that is most of a corner.

  That is where the smaller eigenvalue of the structure tensor is largest: the
  picture changes in every direction there.

  Args:
    image: RGB.
    cells: rows and columns of cells.

  Returns:
    Middles of pixels, (row, column), cells² of them.

  Raises:
    ValueError: the picture has fewer pixels a side than cells.

  Source: Good Features to Track (Shi, Tomasi, 1994).
  """
  if not 1 <= cells <= min(image.shape[:2]):
    raise ValueError(
      f'{cells=} must be between 1 and the sides of {image.shape=}'
    )
  light = image.astype(np.float64).mean(axis=2)
  dy, dx = np.gradient(np.pad(light, 1, mode='edge'))
  dy, dx = dy[1:-1, 1:-1], dx[1:-1, 1:-1]
  a, b, c = (_window_sum(x) for x in (dx * dx, dx * dy, dy * dy))
  smaller = (a + c) / 2 - np.sqrt(((a - c) / 2) ** 2 + b**2)
  edges = [
    np.linspace(0, side, cells + 1).astype(int) for side in image.shape[:2]
  ]
  points = []
  for top, bottom in zip(edges[0][:-1], edges[0][1:], strict=True):
    for left, right in zip(edges[1][:-1], edges[1][1:], strict=True):
      cell = smaller[top:bottom, left:right]
      place = np.unravel_index(np.argmax(cell), cell.shape)
      points.append((top + place[0] + 0.5, left + place[1] + 0.5))
  return np.asarray(points)


def _window_sum(
  values: Float64[np.ndarray, 'height width'],
) -> Float64[np.ndarray, 'height width']:
  """Sums over a square window around each pixel."""
  windows = np.lib.stride_tricks.sliding_window_view(
    np.pad(values, _REACH), (2 * _REACH + 1,) * 2
  )
  return windows.sum(axis=(2, 3))
