"""Where the objects of a scene are.

Positions and lengths are parts of the picture's side; x goes right, y down.

Attributes:
  place_objects: the objects of one scene of a template.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from msba_jax.data.scenes import outlines
from msba_jax.data.scenes.config import SceneConfig
from msba_jax.data.scenes.objects import RADII, SceneObject
from msba_jax.data.scenes.templates import (
  COLOURS,
  SHAPES,
  SIZES,
  TEXTURES,
  Kind,
  Template,
)

_GAP = 0.012  # between the reaches of two objects that keep apart
_ROOMIER = 1.3  # a container is a larger large object
_TILT = 0.25  # largest |dy / dx| of a class that is 'left of', before the view
_TRIES = 10
_SHRINKS = 4
_ATTEMPTS = 500


class _View(NamedTuple):
  zoom: float
  angle: float
  shift_x: float
  shift_y: float

  def see(self, x: float, y: float) -> tuple[float, float]:
    """Where a point of the world is in the picture."""
    x, y = self.turn(x - 0.5, y - 0.5)
    return x + 0.5 + self.shift_x, y + 0.5 + self.shift_y

  def turn(self, x: float, y: float) -> tuple[float, float]:
    """How a vector of the world looks in the picture."""
    cosine, sine = math.cos(self.angle), math.sin(self.angle)
    return (
      self.zoom * (x * cosine - y * sine),
      self.zoom * (x * sine + y * cosine),
    )


def place_objects(
  template: Template, config: SceneConfig, rng: np.random.Generator
) -> list[SceneObject]:
  """Draws objects and places them so that the template holds.

  Args:
    template: the class of the scene.
    config: the knobs.
    rng: what draws.

  Returns:
    Objects from back to front; the subject of the template is the only object
    of its kind, and so are its target and its companion.

  Raises:
    RuntimeError: no room was found, which no setting in range should cause.
  """
  for _ in range(_ATTEMPTS):
    objects = _attempt(template, config, rng)
    if objects is not None:
      return objects
  raise RuntimeError(f'no room for a scene of {template.name} with {config}')


def _attempt(
  template: Template, config: SceneConfig, rng: np.random.Generator
) -> list[SceneObject] | None:
  jitter = config.view_jitter
  u = rng.random(4).tolist()
  view = _View(
    zoom=1 + jitter * 0.3 * (u[0] - 0.5),
    angle=jitter * 0.4 * (u[1] - 0.5),
    shift_x=jitter * 0.1 * (u[2] - 0.5),
    shift_y=jitter * 0.1 * (u[3] - 0.5),
  )
  pair = _place_pair(template, view, rng)
  if pair is None:
    return None
  span = config.most_objects - config.least_objects + 1
  number = config.least_objects + int(rng.random() * span)
  kinds: list[Kind | None] = [*template.kinds[2:]]
  kinds += [None] * (number - 2 - len(kinds))
  placed, depths = list(pair), rng.random(2).tolist()
  if template.relation == 'inside' and depths[0] < depths[1]:
    depths.reverse()
  for kind in kinds:
    depth = float(rng.random())
    # What belongs to the class keeps apart; only distractors hide.
    occlusion = 0.0 if kind else config.occlusion
    found = _place_one(
      kind or _draw_distractor(template, rng),
      view, rng, placed, [d < depth for d in depths], occlusion,
    )  # fmt: skip
    if found is None:
      return None
    placed.append(found)
    depths.append(depth)
  return [placed[i] for i in np.argsort(depths)]


def _draw_distractor(template: Template, rng: np.random.Generator) -> Kind:
  while True:
    kind = Kind(_pick(SHAPES, rng), _pick(COLOURS, rng))
    if kind not in template.kinds:
      return kind


def _place_pair(
  template: Template, view: _View, rng: np.random.Generator
) -> tuple[SceneObject, SceneObject] | None:
  """Places the two objects of the relation, or finds no room."""
  sizes, scale = _draw_sizes(template.relation, rng)
  subject = _make(template.subject, sizes[0], view, rng)
  target = _make(template.target, sizes[1], view, rng)
  target = target._replace(radius=target.radius * scale)
  offset = _draw_offset(template.relation, subject, target, view, rng)
  for u, v in rng.random((4 * _TRIES, 2)).tolist():
    x, y = view.see(u, v)
    pair = (
      subject._replace(x=x, y=y),
      target._replace(x=x + offset[0], y=y + offset[1]),
    )
    if all(map(_in_frame, pair)):
      return pair
  return None


def _draw_sizes(
  relation: str, rng: np.random.Generator
) -> tuple[tuple[str, str], float]:
  """Sizes of subject and target, and by how much the target is enlarged."""
  if relation == 'inside':
    return ('small', 'large'), _ROOMIER
  if relation == 'larger than':
    bigger, smaller = ((2, 0), (2, 1), (1, 0))[int(3 * rng.random())]
    return (SIZES[bigger], SIZES[smaller]), 1.0
  size = _pick(SIZES, rng)
  return (size, size), 1.0


def _draw_offset(
  relation: str,
  subject: SceneObject,
  target: SceneObject,
  view: _View,
  rng: np.random.Generator,
) -> tuple[float, float]:
  """From subject to target, as the view shows it."""
  near, tilt = rng.random(2).tolist()
  if relation == 'inside':
    room = target.radius * outlines.ROOM[target.shape] - subject.reach
    length, angle = 0.95 * room * math.sqrt(near), 2 * math.pi * tilt
    return length * math.cos(angle), length * math.sin(angle)
  length = (subject.reach + target.reach + 1.5 * _GAP) / view.zoom
  length += near * max(0.0, 0.75 - length)
  if relation == 'larger than':
    angle = 2 * math.pi * tilt
    return view.turn(length * math.cos(angle), length * math.sin(angle))
  aside = length * _TILT * (2 * tilt - 1)
  return view.turn(
    *((length, aside) if relation == 'left of' else (aside, length))
  )


def _place_one(
  kind: Kind,
  view: _View,
  rng: np.random.Generator,
  placed: list[SceneObject],
  nearer: list[bool],
  occlusion: float,
) -> SceneObject | None:
  """Places another object, or finds no room.

  Args:
    kind: what to place.
    view: how the scene is seen.
    rng: what draws.
    placed: the objects that stand.
    nearer: which of them it would hide.
    occlusion: how much may be hidden; above 0, most objects go where they hide
      something or are hidden.
  """
  largest = int(rng.random() * len(SIZES))
  for shrunk in range(_SHRINKS):  # where there is no room, something smaller
    candidate = _make(kind, SIZES[max(0, largest - shrunk)], view, rng)
    other = placed[int(rng.random() * len(placed))]
    for u, v in rng.random((_TRIES, 2)).tolist():
      x, y = view.see(u, v)
      if occlusion and shrunk < _SHRINKS // 2:
        angle = 2 * math.pi * v
        length = (0.45 + 0.5 * u) * (candidate.radius + other.radius)
        x = other.x + length * math.cos(angle)
        y = other.y + length * math.sin(angle)
      candidate = candidate._replace(x=x, y=y)
      if _in_frame(candidate) and _fits(candidate, placed, nearer, occlusion):
        return candidate
  return None


def _fits(
  candidate: SceneObject,
  placed: list[SceneObject],
  nearer: list[bool],
  occlusion: float,
) -> bool:
  """Whether nothing is hidden too much, by the overlap of discs."""
  covered = 0.0
  for other, over in zip(placed, nearer, strict=True):
    distance = math.hypot(candidate.x - other.x, candidate.y - other.y)
    if distance >= candidate.reach + other.reach + _GAP:
      continue
    if occlusion == 0:
      return False
    if distance < 0.35 * max(candidate.radius, other.radius):
      return False
    lens = _lens(distance, candidate.radius, other.radius)
    if over:
      if lens > 0.8 * occlusion * math.pi * other.radius**2:
        return False
    else:
      covered += lens
  return covered <= 0.8 * occlusion * math.pi * candidate.radius**2


def _lens(distance: float, first: float, second: float) -> float:
  """Area that two discs share."""
  if distance >= first + second:
    return 0.0
  if distance <= abs(first - second):
    return math.pi * min(first, second) ** 2
  along = (distance**2 + first**2 - second**2) / (2 * distance)
  alpha = math.acos(along / first)
  beta = math.acos((distance - along) / second)
  return (
    first**2 * (alpha - math.sin(2 * alpha) / 2)
    + second**2 * (beta - math.sin(2 * beta) / 2)
  )  # fmt: skip


def _make(
  kind: Kind, size: str, view: _View, rng: np.random.Generator
) -> SceneObject:
  """An object that has everything but a place."""
  texture = _pick(TEXTURES, rng)
  stretch, turn = rng.random(2).tolist()
  return SceneObject(
    *kind, size, texture, 0.0, 0.0,
    radius=RADII[size] * view.zoom * (0.95 + 0.1 * stretch),
    angle=view.angle + 0.4 * (turn - 0.5),
  )  # fmt: skip


def _in_frame(thing: SceneObject) -> bool:
  reach = thing.reach + 0.01
  return (
    reach <= thing.x <= 1 - reach and reach <= thing.y <= 1 - reach
  )  # fmt: skip


def _pick(names: tuple[str, ...], rng: np.random.Generator) -> str:
  return names[int(rng.random() * len(names))]
