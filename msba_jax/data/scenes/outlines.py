"""Outlines of the shapes, as radius by angle.

Every outline is seen from its centre: r(θ) in units of the object's radius, so
that a point p is within the shape where |p| ≤ r(angle of p). The shapes have
about the area of a circle of that radius.

Attributes:
  BINS: angles in a table.
  REACH: largest r of each shape: no point is further from the centre.
  ROOM: radius of the free disc within a container, inside its border.
  HOLE: part of r that is cut out of a ring.
  BORDER: part of r that is border.
  radius_table: r at `BINS` angles from −π to π.
"""

from __future__ import annotations

import functools
import math

import numpy as np

BINS = 720
HOLE = 0.6
BORDER = 0.14


def _regular(corners: int, radius: float, *, turn: float = 0.0) -> np.ndarray:
  angles = turn + 2 * math.pi * np.arange(corners) / corners
  return radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def _star() -> np.ndarray:
  up = -math.pi / 2
  points = np.empty((10, 2))
  points[::2] = _regular(5, 1.4, turn=up)
  points[1::2] = _regular(5, 0.68, turn=up + math.pi / 5)
  return points


def _cross() -> np.ndarray:
  long, short = 1.18, 0.42
  quarter = np.array([[short, short], [short, long], [-short, long]])
  turns = [np.array([[0, 1], [-1, 0]])] * 4
  corners = []
  for turn in turns:
    corners.append(quarter)
    quarter = quarter @ turn
  return np.concatenate(corners)


def _heart() -> np.ndarray:
  t = np.linspace(0, 2 * math.pi, 200, endpoint=False)
  x = 16 * np.sin(t) ** 3
  y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
  return np.stack([x, -y - 2], axis=-1) / 13


_POLYGONS = {
  'circle': lambda: _regular(180, 1.0),
  'square': lambda: _regular(4, 1.24, turn=math.pi / 4),
  'triangle': lambda: _regular(3, 1.42, turn=-math.pi / 2),
  'star': _star,
  'hexagon': lambda: _regular(6, 1.1),
  'cross': _cross,
  'heart': _heart,
  'ring': lambda: _regular(180, 1.12),
}


@functools.cache
def radius_table(shape: str) -> np.ndarray:
  """Radius of a shape by angle.

  Args:
    shape: one of `SHAPES`.

  Returns:
    (BINS,) float32, from angle −π on, x to the right and y down.
  """
  corners = _POLYGONS[shape]()
  steps = np.linspace(0, 1, 64, endpoint=False)[:, None, None]
  edges = corners * (1 - steps) + np.roll(corners, -1, axis=0) * steps
  points = edges.reshape(-1, 2)
  angles = np.arctan2(points[:, 1], points[:, 0])
  order = np.argsort(angles)
  at = -math.pi + 2 * math.pi * (np.arange(BINS) + 0.5) / BINS
  radii = np.hypot(points[:, 0], points[:, 1])
  return np.interp(at, angles[order], radii[order], period=2 * math.pi).astype(
    np.float32
  )


REACH = {shape: float(radius_table(shape).max()) for shape in _POLYGONS}
ROOM = {
  shape: float(radius_table(shape).min())
  * (HOLE if shape == 'ring' else 1 - BORDER)
  for shape in ('circle', 'square', 'hexagon', 'ring')
}
