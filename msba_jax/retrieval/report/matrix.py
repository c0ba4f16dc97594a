"""The attention of a batch as a matrix: where its cells and faces stand.

Attributes:
  FACE_PIXELS: side of the thumbnails on the axes.
  layout: positions, opacities and texts for the template.
  summary: what the matrix says, in sentences.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from msba_jax.retrieval.report.data import AttentionMap
from msba_jax.retrieval.report.headline import percent
from msba_jax.retrieval.report.picture import thumbnail

FACE_PIXELS = 56
_SIDE, _FACE, _GUTTER, _GAP = 22, 21, 16, 4
_LETTER = 5.2


def layout(attention: AttentionMap) -> dict[str, Any]:
  """Positions, opacities and texts for the template.

  Args:
    attention: weights and pictures.

  Returns:
    The variables of `attention.svg`. A cell is opaque at the largest weight
    between two different images; what an image reads from itself may exceed
    it and is drawn just as opaque.

  Raises:
    ValueError: weights and pictures differ in number.
  """
  count = len(attention.pictures)
  weights = attention.weights
  if weights.shape != (count, count):
    raise ValueError(f'{weights.shape=} does not fit {count} pictures')
  start = _GUTTER + _FACE + _GAP
  end = start + count * _SIDE
  others = weights[~np.eye(count, dtype=bool)]
  high = float(others.max(initial=0.0)) or float(weights.max(initial=1e-9))
  names = [
    f'{p.id} ({p.label})' if p.label else p.id for p in attention.pictures
  ]
  return {
    'box': f'0 0 {end + 4} {end + 24}',
    'alt': f'Attention of {count} images to each other. {summary(attention)}',
    'uris': [thumbnail(p.image, FACE_PIXELS) for p in attention.pictures],
    'face': _FACE,
    'side': _SIDE - 1,
    'faces': [
      {
        'index': i,
        'across': start + i * _SIDE,
        'top': _GUTTER,
        'left': _GUTTER,
        'name': name,
      }
      for i, name in enumerate(names)
    ],
    'cells': [
      {
        'x': start + m * _SIDE,
        'y': start + n * _SIDE,
        'opacity': f'{min(max(weights[n, m] / high, 0.0), 1.0):.3f}',
        'title': f'{names[n]} reads {percent(weights[n, m])} from {names[m]}',
      }
      for n, m in itertools.product(range(count), repeat=2)
    ],
    'groups': _groups(attention, start),
    'legend': {
      'x': start + 20,
      'y': end + 10,
      'high': f'{percent(high)} and more',
    },
  }


def summary(attention: AttentionMap) -> str:
  """What the matrix says: attention to itself, its class, and the rest.

  Args:
    attention: weights and pictures.

  Returns:
    One or two sentences; empty without class names.
  """
  labels = np.asarray([p.label for p in attention.pictures])
  count = len(labels)
  if count < 2 or not all(labels):
    return ''
  own = np.eye(count, dtype=bool)
  same = (labels[:, None] == labels[None, :]) & ~own
  total = attention.weights.sum()
  if not total > 0:
    return 'No image reads anything in this batch.'
  share = attention.weights[same].sum() / total
  itself = attention.weights[own].sum() / total
  return (
    f'On average an image reads {percent(itself)} from itself and '
    f'{percent(share)} from the other images of its class, where looking '
    f'at all alike would give {percent(1 / count)} and '
    f'{percent(same.mean())}.'
  )


def _groups(attention: AttentionMap, start: int) -> list[dict[str, Any]]:
  """Frames around neighbouring pictures of one class, with its name."""
  labels = [picture.label for picture in attention.pictures]
  groups, first = [], 0
  for label, members in itertools.groupby(labels):
    number = len(list(members))
    size = number * _SIDE
    if label:
      at = start + first * _SIDE
      limit = max(1, int(size / _LETTER))
      name = label if len(label) <= limit else label[: limit - 1] + '…'
      groups.append(
        {
          'at': at - 0.5,
          'size': size,
          'middle': at + size / 2,
          'label_at': _GUTTER - 5,
          'name': name,
        }
      )
    first += number
  return groups
