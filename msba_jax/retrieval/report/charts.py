"""Which charts the page shows, with their titles and descriptions.

Attributes:
  panel: a panel of training curves.
  classes: charts and table of recall per class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from msba_jax.retrieval.report import figures
from msba_jax.retrieval.report.data import ClassRecall, CurvePanel, ReportData
from msba_jax.retrieval.report.headline import percent, points
from msba_jax.retrieval.report.picture import data_uri

_CHARTED = 25
_ROWS_AT_MOST = 500


def _chart(
  title: str, alt: str, draw: Callable[[figures.Theme], bytes]
) -> dict[str, str]:
  return {
    'title': title,
    'alt': alt,
    'light': data_uri(draw(figures.LIGHT), 'image/svg+xml'),
    'dark': data_uri(draw(figures.DARK), 'image/svg+xml'),
  }


def panel(curves: CurvePanel) -> dict[str, str]:
  """A panel of training curves.

  Args:
    curves: the curves.

  Returns:
    Title, description and both pictures.
  """
  texts = []
  for curve in curves.curves:
    finite = np.flatnonzero(np.isfinite(curve.values))
    if finite.size:
      first, last = (float(curve.values[finite[i]]) for i in (0, -1))
      ends = (
        f'{percent(first)} to {percent(last)}'
        if curves.percent
        else f'{first:.3g} to {last:.3g}'
      )
      texts.append(f'{curve.name} from {ends}')
  steps = max(
    (int(c.steps[-1]) for c in curves.curves if c.steps.size), default=0
  )
  alt = f'{curves.title} over {steps:,} steps: {"; ".join(texts)}'
  return _chart(
    curves.title, alt, functools.partial(figures.curve_chart, curves)
  )


def classes(data: ReportData) -> Mapping[str, Any] | None:
  """The charts and the table of recall per class, best class first.

  Args:
    data: of the report.

  Returns:
    The template's variables; None without classes.
  """
  if not data.classes:
    return None
  after = data.after if any(c.after is not None for c in data.classes) else None
  ordered = sorted(data.classes, key=lambda c: (-c.before, c.name))
  left_out = len(ordered) > 2 * _CHARTED
  half = _CHARTED if left_out else -(-len(ordered) // 2)
  if len(ordered) <= _CHARTED // 2:
    parts = [('', ordered)]
  else:
    parts = [('Best', ordered[:half]), ('Worst', ordered[-half:])]
    if not left_out:
      parts[1] = ('Worst', ordered[half:])
  worst = ordered[-_ROWS_AT_MOST:]
  return {
    'charts': [_recall_chart(t, part, data.before, after) for t, part in parts],
    'left_out': left_out,
    'charted': _CHARTED,
    'count': len(ordered),
    'after': after is not None,
    'rows': [
      {
        'name': c.name,
        'queries': f'{c.queries:,}',
        'before': percent(c.before),
        'after': '–' if c.after is None else percent(c.after),
        'change': '–' if c.after is None else points(c.after - c.before),
      }
      for c in worst
    ],
  }


def _recall_chart(
  title: str, part: Sequence[ClassRecall], before: str, after: str | None
) -> dict[str, str]:
  ends = f'{part[0].name} {percent(part[0].before)}'
  if len(part) > 1:
    ends += f' down to {part[-1].name} {percent(part[-1].before)}'
  alt = f'Recall@1 of {len(part)} classes, {before}: {ends}; all in the table'
  return _chart(
    f'{title} classes' if title else '',
    alt,
    functools.partial(figures.recall_chart, part, before=before, after=after),
  )
