"""The causal graph of a batch as a drawing: faces on a circle, arrows.

An arrow runs from an image to one that depends on it. Only the strongest into
each image are drawn, which a table lists again in numbers.

Attributes:
  FACE_PIXELS: side of the thumbnails.
  Edge: an arrow.
  strongest_edges: the arrows that are drawn.
  layout: positions, widths and texts for the template.
  summary: what the graph says, in sentences.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from msba_jax.retrieval.report.data import CausalMap
from msba_jax.retrieval.report.headline import percent
from msba_jax.retrieval.report.picture import thumbnail

FACE_PIXELS = 96
_FACE, _CLEAR, _RADIUS = 48, 33, 215.0
_WIDTH, _HEIGHT = 860, 540
_LETTERS = 24
_THIN, _THICK = 1.0, 5.0


class Edge(NamedTuple):
  """An arrow.

  Attributes:
    source: the image on which the other depends.
    target: the image that depends.
    strength: how much.
  """

  source: int
  target: int
  strength: float


def strongest_edges(
  weights: Float[np.ndarray, 'n n'], *, most: int = 2
) -> tuple[Edge, ...]:
  """The strongest arrows into each image.

  Args:
    weights: how much image n (a row) depends on image m (a column).
    most: arrows into an image; fewer where others have no strength.

  Returns:
    The arrows, strongest first.

  Example:
    >>> strongest_edges(np.array([[0.0, 0.3], [0.0, 0.0]]))
    (Edge(source=1, target=0, strength=0.3),)
  """
  others = np.where(np.eye(len(weights), dtype=bool), 0.0, weights)
  edges = [
    Edge(int(m), n, float(row[m]))
    for n, row in enumerate(others)
    for m in np.argsort(-row, kind='stable')[:most]
    if row[m] > 0
  ]
  return tuple(sorted(edges, key=lambda edge: -edge.strength))


def layout(
  graph: CausalMap, *, level: int | None = None, most: int = 2
) -> dict[str, Any]:
  """Positions, widths and texts for the template.

  Args:
    graph: weights and pictures.
    level: which level is drawn; None is the mean over all.
    most: arrows into an image.

  Returns:
    The variables of `causal.svg` and of the table beside it. The widest arrow
    is the strongest one.

  Raises:
    ValueError: weights and pictures differ in number.
  """
  count = len(graph.pictures)
  if graph.weights.shape[1:] != (count, count):
    raise ValueError(f'{graph.weights.shape=} does not fit {count} pictures')
  weights = (
    graph.weights.mean(axis=0) if level is None else graph.weights[level]
  )
  edges = strongest_edges(weights, most=most)
  labels = [picture.label for picture in graph.pictures]
  names = [
    f'{number}. {p.id} ({p.label})' if p.label else f'{number}. {p.id}'
    for number, p in enumerate(graph.pictures, start=1)
  ]
  angles = _angles(labels)
  places = [_on_circle(angle, _RADIUS) for angle in angles]
  high = edges[0].strength if edges else 1.0
  return {
    'box': f'0 0 {_WIDTH} {_HEIGHT}',
    'alt': f'Causal graph of {count} images. {summary(graph, level=level)}',
    'face': _FACE,
    'faces': [
      {
        'uri': thumbnail(picture.image, FACE_PIXELS),
        'x': f'{x - _FACE / 2:.1f}',
        'y': f'{y - _FACE / 2:.1f}',
        'name': name,
        'number': number,
      }
      for number, (picture, (x, y), name) in enumerate(
        zip(graph.pictures, places, names, strict=True), start=1
      )
    ],
    'groups': _groups(labels, angles),
    'arrows': [
      {
        **_arrow(places[e.source], places[e.target], e.strength / high),
        'kind': _kind(labels, e),
        'title': f'{names[e.target]} depends on {names[e.source]}: '
        f'{percent(e.strength)}',
      }
      for e in reversed(edges)  # the strong ones lie on top
    ],
    'high': percent(high) if edges else '',
    'known': all(labels),
    'levels': len(graph.weights),
    'rows': [
      {
        'source': names[e.source],
        'target': names[e.target],
        'strength': percent(e.strength),
        'levels': [percent(w[e.target, e.source]) for w in graph.weights],
      }
      for e in edges
    ],
  }


def summary(graph: CausalMap, *, level: int | None = None) -> str:
  """What the graph says: how much of it lies between images of one class.

  Args:
    graph: weights and pictures.
    level: of which level; None is the mean over all.

  Returns:
    A sentence; empty without class names.
  """
  weights = (
    graph.weights.mean(axis=0) if level is None else graph.weights[level]
  )
  total = weights.sum()
  if not total > 0:
    return 'No image depends on another in this batch.'
  labels = np.asarray([picture.label for picture in graph.pictures])
  count = len(labels)
  if count < 2 or not all(labels):
    return ''
  same = (labels[:, None] == labels[None, :]) & ~np.eye(count, dtype=bool)
  return (
    f'{percent(weights[same].sum() / total)} of the strength of all edges lies '
    f'between images of one class, where equal edges would give '
    f'{percent(same.sum() / (count * (count - 1)))}.'
  )


def _kind(labels: list[str], edge: Edge) -> str:
  """Whether an arrow stays in a class, where classes are known."""
  source, target = labels[edge.source], labels[edge.target]
  return 'across' if source and target and source != target else 'within'


def _angles(labels: list[str]) -> list[float]:
  """Angles on the circle, with a gap between classes."""
  steps = np.array(
    [1.5 if a != b else 1.0 for a, b in itertools.pairwise(labels)]
  )
  last = 1.5 if labels[0] != labels[-1] else 1.0
  slots = np.concatenate([[0.0], np.cumsum(steps)])
  turn = 2 * math.pi / (slots[-1] + last)
  return [float(slot * turn - math.pi / 2) for slot in slots]


def _on_circle(angle: float, radius: float) -> tuple[float, float]:
  return (
    _WIDTH / 2 + radius * math.cos(angle),
    _HEIGHT / 2 + radius * math.sin(angle),
  )


def _groups(labels: list[str], angles: list[float]) -> list[dict[str, Any]]:
  """Names of classes outside the circle, beside their images."""
  groups, first = [], 0
  for label, members in itertools.groupby(labels):
    number = len(list(members))
    if label:
      angle = (angles[first] + angles[first + number - 1]) / 2
      x, y = _on_circle(angle, _RADIUS + 0.85 * _FACE)
      side = math.cos(angle)
      groups.append(
        {
          'x': f'{x:.1f}',
          'y': f'{y + 4 + 6 * math.sin(angle):.1f}',
          'anchor': 'middle'
          if abs(side) < 0.25
          else ('start' if side > 0 else 'end'),
          'name': label
          if len(label) <= _LETTERS
          else label[: _LETTERS - 1] + '…',
          'full': label,
        }
      )
    first += number
  return groups


def _arrow(
  start: tuple[float, float], end: tuple[float, float], share: float
) -> dict[str, str]:
  """An arrow that bends to its left, so that its opposite lies beside it."""
  a, b = np.array(start), np.array(end)
  across = b - a
  bend = (a + b) / 2 + 0.14 * np.array([across[1], -across[0]])
  width = _THIN + (_THICK - _THIN) * share
  leaving, arriving = (x / np.linalg.norm(x) for x in (bend - a, b - bend))
  first, tip = a + _CLEAR * leaving, b - _CLEAR * arriving
  length, half = 6 + 1.5 * width, 2.5 + 0.9 * width
  neck = tip - length * arriving
  side = half * np.array([-arriving[1], arriving[0]])

  def points(*places: np.ndarray) -> str:
    return ' '.join(f'{x:.1f},{y:.1f}' for x, y in places)

  return {
    'shaft': f'M{points(first)} Q{points(bend, neck)}',
    'head': points(tip, neck + side, neck - side),
    'width': f'{width:.2f}',
  }
