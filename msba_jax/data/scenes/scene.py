"""Draws one scene, a pure function of seed, index, knobs and split.

Attributes:
  Scene: a picture and all that is known about it.
  draw_scene: draws one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from msba_jax.data.scenes.captions import describe
from msba_jax.data.scenes.config import SPLITS, SceneConfig, Split
from msba_jax.data.scenes.layout import place_objects
from msba_jax.data.scenes.objects import Edge, SceneObject, find_relations
from msba_jax.data.scenes.render import Painting, paint
from msba_jax.data.scenes.templates import HUES, Template, make_templates

__all__ = ['Scene', 'draw_scene']

_ATTEMPTS = 100


class Scene(NamedTuple):
  """A picture and all that is known about it.

  Attributes:
    image: uint8, (size, size, 3), RGB.
    label: index into `make_templates(seed, config)`.
    number: of the scene in its split.
    hue: name of the hue of the background.
    boxes: float32, (objects, 4): top, left, bottom, right of what is visible,
      as parts of the side.
    masks: Boolean, (objects, size, size): what is visible; disjoint.
    objects: from back to front.
    graph: the relations that hold; the first is that of the class.
    captions: English sentences.
  """

  image: np.ndarray
  label: int
  number: int
  hue: str
  boxes: np.ndarray
  masks: np.ndarray
  objects: tuple[SceneObject, ...]
  graph: tuple[Edge, ...]
  captions: tuple[str, ...]


def draw_scene(
  seed: int,
  index: int,
  config: SceneConfig,
  *,
  split: Split = 'train',
) -> Scene:
  """Draws a scene.

  Scene i has the i-th class of its split, modulo their number. The split
  `shifted` has the scenes of the test; only their backgrounds are drawn with
  another correlation.

  Args:
    seed: chooses the classes and the scenes.
    index: number of the scene in its split, from 0.
    config: the knobs.
    split: whose classes are drawn.

  Returns:
    The scene; always the same for the same arguments.

  Raises:
    ValueError: seed or index is negative.

  Example:
    >>> scene = draw_scene(0, 7, SceneConfig(size=32))
    >>> scene.image.shape, scene.masks.shape == (len(scene.objects), 32, 32)
    ((32, 32, 3), True)
  """
  if seed < 0 or index < 0:
    raise ValueError(f'{seed=} and {index=} must not be negative')
  classes = config.classes(split)
  label = classes[index % len(classes)]
  template = make_templates(seed, config)[label]
  stream = SPLITS.index('test' if split == 'shifted' else split)
  rng = np.random.default_rng((seed, stream, index))
  u = rng.random(3).tolist()
  hue = label if u[0] < config.correlation(split) else int(u[1] * len(HUES))
  hue %= len(HUES)
  for _ in range(_ATTEMPTS):
    objects = place_objects(template, config, rng)
    relations = find_relations(objects)
    painting = paint(
      objects, hue, size=config.size, noise=config.noise, rng=rng
    )
    hidden = _measure_hidden(painting, relations)
    if painting.visible.any(axis=(1, 2)).all() and (
      max(hidden) <= config.occlusion
    ):
      break
  else:
    raise RuntimeError(f'every scene {index} of {split} hides too much')
  things = tuple(
    _round(thing._replace(hidden=part))
    for thing, part in zip(objects, hidden, strict=True)
  )
  graph = _put_first(template, things, relations)
  captions = describe(things, graph, hue, variant=int(u[2] * 1000))
  return Scene(
    painting.image, label, index, HUES[hue], _find_boxes(painting.visible),
    painting.visible, things, graph, captions,
  )  # fmt: skip


def _measure_hidden(
  painting: Painting, relations: tuple[Edge, ...]
) -> list[float]:
  """Part of each object that others hide, without what lies inside it."""
  inside = {
    (edge.target, edge.subject)
    for edge in relations
    if edge.relation == 'inside'
  }
  parts = []
  for i, mask in enumerate(painting.full):
    front = np.zeros_like(mask)
    for j in range(i + 1, len(painting.full)):
      if (i, j) not in inside:
        front |= painting.full[j]
    parts.append(float((mask & front).sum() / mask.sum()))
  return parts


def _put_first(
  template: Template,
  things: tuple[SceneObject, ...],
  relations: tuple[Edge, ...],
) -> tuple[Edge, ...]:
  """Puts the relation of the class before the others."""
  kinds = [thing.kind for thing in things]
  edge = Edge(
    kinds.index(template.subject),
    template.relation,
    kinds.index(template.target),
  )
  return (edge, *(other for other in relations if other != edge))


def _find_boxes(masks: np.ndarray) -> np.ndarray:
  """Tight boxes around masks, as parts of the side."""
  boxes = []
  for mask in masks:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    boxes.append([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])
  return np.asarray(boxes, np.float32) / np.float32(masks.shape[-1])


def _round(thing: SceneObject) -> SceneObject:
  """Keeps what float32 keeps, so that a stored scene equals a drawn one."""
  return thing._make(
    float(np.float32(x)) if isinstance(x, float) else x for x in thing
  )
