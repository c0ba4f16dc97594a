"""Headline numbers in words: percentages, intervals, cards and the table.

Attributes:
  CARDS: the metrics that get a card, where they are given.
  percent: a fraction in words.
  points: a difference of fractions in words.
  cards: one card per headline metric, each with all modes.
  table: one row per mode with all metrics.
  metric_names: the columns of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from msba_jax.retrieval.report.data import Estimate, Mode
from msba_jax.retrieval.report.figures import LIGHT

CARDS = ('Recall@1', 'mAP', 'MAP@R')


def percent(fraction: float) -> str:
  r"""A fraction in words; '–' for what is not finite.

  Args:
    fraction: a fraction of one.

  Returns:
    Its percentage with one decimal.

  Example:
    >>> percent(0.3125)
    '31.2\xa0%'
  """
  return f'{100 * fraction:.1f}\u00a0%' if np.isfinite(fraction) else '–'


def points(fraction: float) -> str:
  """A difference of fractions in words.

  Args:
    fraction: a difference of fractions of one.

  Returns:
    It in percentage points, with its sign.

  Example:
    >>> points(0.0125)
    '+1.2'
  """
  return f'{100 * fraction:+.1f}'.replace('-', '−')


def _interval(estimate: Estimate) -> str:
  if estimate.low is None or estimate.high is None:
    return ''
  return f'{100 * estimate.low:.1f} – {100 * estimate.high:.1f}'


def metric_names(modes: Sequence[Mode]) -> list[str]:
  """The columns of the table, in the order in which modes have them.

  Args:
    modes: of the report.

  Returns:
    Names of metrics.
  """
  return list(dict.fromkeys(name for mode in modes for name in mode.metrics))


def cards(modes: Sequence[Mode]) -> list[dict[str, Any]]:
  """One card per headline metric; the first metrics where none is given.

  Args:
    modes: of the report.

  Returns:
    The template's variables of every card.
  """
  names = metric_names(modes)
  chosen = [name for name in CARDS if name in names] or names[:3]
  return [
    {
      'name': name,
      'rows': [
        _card_row(index, mode, name, modes[0].name)
        for index, mode in enumerate(modes)
        if name in mode.metrics
      ],
    }
    for name in chosen
  ]


def _card_row(index: int, mode: Mode, name: str, first: str) -> dict[str, Any]:
  estimate = mode.metrics[name]
  low, high = estimate.low, estimate.high
  given = low is not None and high is not None
  gain, text = mode.gains.get(name), ''
  if gain is not None:
    text = f'{points(gain.value)} points on {first}'
    if gain.low is not None and gain.high is not None:
      text += f' ({points(gain.low)} to {points(gain.high)})'
  return {
    'mode': mode.name,
    'series': index % len(LIGHT.series),
    'value': percent(estimate.value),
    'interval': f'95 % interval {_interval(estimate)}' if given else '',
    'gain': text,
    'width': round(1000 * float(np.clip(np.nan_to_num(estimate.value), 0, 1))),
    'low': round(1000 * low) if low is not None and given else None,
    'span': max(4, round(1000 * (high - low)))
    if low is not None and high is not None
    else 0,
  }


def table(modes: Sequence[Mode]) -> list[dict[str, Any]]:
  """One row per mode with all metrics.

  Args:
    modes: of the report.

  Returns:
    The template's variables of every row.
  """
  names = metric_names(modes)
  absent = {'value': '–', 'interval': ''}
  return [
    {
      'mode': mode.name,
      'description': mode.description,
      'cells': [
        {
          'value': percent(mode.metrics[name].value),
          'interval': _interval(mode.metrics[name]),
        }
        if name in mode.metrics
        else absent
        for name in names
      ],
    }
    for mode in modes
  ]
