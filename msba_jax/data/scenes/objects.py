"""The objects of a scene, and what holds between them.

Positions and lengths are parts of the picture's side; x goes right, y down.

Attributes:
  RADII: radius of the sizes.
  SceneObject: one object.
  Edge: a relation between two objects of a scene.
  find_relations: every relation that holds in a scene.
  is_inside: whether one object lies within another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from msba_jax.data.scenes import outlines
from msba_jax.data.scenes.templates import SIZES, Kind

RADII = {'small': 0.075, 'medium': 0.11, 'large': 0.155}

_LEANING = 0.6  # largest |dy / dx| that counts as 'left of'


class SceneObject(NamedTuple):
  """One object of a scene.

  Attributes:
    shape: one of `SHAPES`.
    colour: one of `COLOURS`.
    size: one of `SIZES`.
    texture: one of `TEXTURES`.
    x: centre, from the left.
    y: centre, from the top.
    radius: of a circle of about the same area.
    angle: by which it is turned clockwise, in radians.
    hidden: part that objects in front hide; what lies inside hides nothing.
  """

  shape: str
  colour: str
  size: str
  texture: str
  x: float
  y: float
  radius: float
  angle: float
  hidden: float = 0.0

  @property
  def kind(self) -> Kind:
    """Shape and colour."""
    return Kind(self.shape, self.colour)

  @property
  def reach(self) -> float:
    """No point of the object is further from its centre."""
    return self.radius * outlines.REACH[self.shape]


class Edge(NamedTuple):
  """A relation: objects[subject] is `relation` objects[target]."""

  subject: int
  relation: str
  target: int


def find_relations(objects: Sequence[SceneObject]) -> tuple[Edge, ...]:
  """Every relation that holds between two of the objects.

  'inside' excludes all others between its two objects but their sizes. Between
  other objects 'left of' and 'above' need a clear direction, so that neither
  may hold.

  Args:
    objects: from back to front.

  Returns:
    The relations, in the order of subject and target.
  """
  edges = []
  for i, first in enumerate(objects):
    for j, second in enumerate(objects):
      if i != j:
        edges += [Edge(i, name, j) for name in _between(first, second, i > j)]
  return tuple(edges)


def _between(
  first: SceneObject, second: SceneObject, nearer: bool
) -> list[str]:
  names = []
  if SIZES.index(first.size) > SIZES.index(second.size):
    names.append('larger than')
  if is_inside(second, first):
    return names
  if is_inside(first, second):
    return [*names, 'inside']
  dx, dy = second.x - first.x, second.y - first.y
  if dx > 0 and abs(dy) <= _LEANING * dx:
    names.append('left of')
  if dy > 0 and abs(dx) <= _LEANING * dy:
    names.append('above')
  if nearer and math.hypot(dx, dy) < first.radius + second.radius:
    names.append('in front of')
  return names


def is_inside(inner: SceneObject, outer: SceneObject) -> bool:
  """Whether all of one object lies in the free disc of the other."""
  distance = math.hypot(inner.x - outer.x, inner.y - outer.y)
  room = outer.radius * outlines.ROOM.get(outer.shape, 0.0)
  return distance + inner.reach <= room
