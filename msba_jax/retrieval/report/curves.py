"""Training curves from the lines of a run's `metrics.jsonl`.

Attributes:
  METRICS: names of metrics that do not follow from their key.
  metric_name: how a metric is called on the page.
  curve_panels: the panels of a report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from msba_jax.retrieval.report.data import Curve, CurvePanel

METRICS = {
  'ap': 'mAP',
  'ap_trapezoidal': 'mAP (trapezoidal)',
  'map@r': 'MAP@R',
  'r_precision': 'R-precision',
}
# What a training line tells beside losses, and the title of its own panel.
_PANELS = {
  'learning_rate': 'Learning rate',
  'gradient_norm': 'Norm of the gradient',
  'images_per_second': 'Images per second',
}
_NO_CURVE = {'step', 'phase', 'averaged_steps', 'data_wait'}
_HEADLINES = ('recall@1', 'ap', 'map@r')


def metric_name(key: str) -> str:
  """How a metric is called on the page.

  Args:
    key: as the metrics room calls it.

  Returns:
    Its name.

  Example:
    >>> metric_name('recall@1'), metric_name('ap')
    ('Recall@1', 'mAP')
  """
  return METRICS.get(key, key[:1].upper() + key[1:].replace('_', ' '))


def curve_panels(rows: Sequence[Mapping[str, Any]]) -> tuple[CurvePanel, ...]:
  """The panels of a report: losses, the rest of training, validation.

  Args:
    rows: lines with `step`, `phase` ('train' or 'validation') and numbers by
      name. A validation metric of a mode is called `mode/metric`.

  Returns:
    The panels; none for what no line has.
  """
  train = [row for row in rows if row.get('phase', 'train') == 'train']
  validation = [row for row in rows if row.get('phase') == 'validation']
  losses = [k for k in _keys(train) if k not in _PANELS]
  losses.sort(key=lambda key: key != 'loss')
  panels = [CurvePanel('Loss', _curves(train, losses), smooth=True)]
  panels += [
    CurvePanel(title, _curves(train, [key]), smooth=key != 'learning_rate')
    for key, title in _PANELS.items()
  ]
  panels += _validation_panels(validation)
  return tuple(panel for panel in panels if panel.curves)


def _validation_panels(rows: Sequence[Mapping[str, Any]]) -> list[CurvePanel]:
  """One panel per metric, with a curve for each mode."""
  by_metric: dict[str, list[str]] = {}
  for key in _keys(rows):
    by_metric.setdefault(key.rpartition('/')[2], []).append(key)
  chosen = [m for m in _HEADLINES if m in by_metric] or list(by_metric)[:3]
  return [
    CurvePanel(
      f'Validation: {metric_name(metric)}',
      _curves(rows, by_metric[metric], short=True),
      percent=True,
    )
    for metric in chosen
  ]


def _keys(rows: Iterable[Mapping[str, Any]]) -> list[str]:
  """Names of the numbers in the rows, in the order they first stand there."""
  found = dict.fromkeys(
    key
    for row in rows
    for key, value in row.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
  )
  return [key for key in found if key not in _NO_CURVE]


def _curves(
  rows: Sequence[Mapping[str, Any]], keys: Sequence[str], *, short: bool = False
) -> tuple[Curve, ...]:
  curves = []
  for key in keys:
    points = sorted((row['step'], row[key]) for row in rows if key in row)
    if not points:
      continue
    steps, values = zip(*points, strict=True)
    name = key.rpartition('/')[0] or 'solo' if short else key.replace('_', ' ')
    curves.append(
      Curve(name, np.asarray(steps, np.int64), np.asarray(values, np.float64))
    )
  return tuple(curves)
