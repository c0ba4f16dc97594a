"""Scores of queries, summed up by mode and by class.

Attributes:
  Scores: of one mode: a number for each query, by metric.
  INTERVAL: what the intervals are, for the reader.
  mask_scores: scores of `evaluate_retrieval`, NaN where they mean nothing.
  average_modes: means with intervals and gains.
  recall_per_class: recall@1 of the queries of each class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from msba_jax.data.source import Source
from msba_jax.metrics.intervals import (
  Interval,
  bootstrap_interval,
  paired_bootstrap,
)
from msba_jax.retrieval.report.curves import metric_name
from msba_jax.retrieval.report.data import ClassRecall, Estimate, Mode

Scores = Mapping[str, np.ndarray]

# Metrics with an interval: drawing for all of them would take minutes.
_HEADLINES = ('recall@1', 'ap', 'map@r')
INTERVAL = (
  'Intervals hold 95 % of {resamples:,} resampled test sets, in which classes '
  'and then the queries of each are drawn with replacement; differences are '
  'paired. What another training would change they do not tell.'
)
_DESCRIPTIONS = {
  'solo': 'each image by itself',
  'memory': 'each image in the context of the memory of training',
  'neighbours': 'each image in the context of its nearest gallery images',
  'refinement': 'control without training: solo vectors moved towards '
  'their nearest gallery vectors',
}


def mask_scores(found: Scores) -> dict[str, np.ndarray]:
  """Scores as float64, NaN for a query that nothing can answer.

  Args:
    found: what `evaluate_retrieval` returns; its `valid`, if there is one,
      says which queries have an image of their class in the gallery.

  Returns:
    The scores without `valid`.
  """
  valid = np.asarray(found.get('valid', True))
  return {
    name: np.where(valid, np.asarray(values, np.float64), np.nan)
    for name, values in found.items()
    if name != 'valid'
  }


def average_modes(
  scores: Mapping[str, Scores],
  labels: Int[np.ndarray, ' q'],
  resamples: int,
  seed: int,
) -> tuple[Mode, ...]:
  """Means of all scores; headlines with intervals and gains.

  Args:
    scores: by mode; gains are on the first.
    labels: class of every query.
    resamples: resampled test sets behind the intervals.
    seed: of the draws.

  Returns:
    One entry for each mode.
  """
  modes = []
  base = next(iter(scores.values()), {})
  for mode, found in scores.items():
    metrics: dict[str, Estimate] = {}
    gains: dict[str, Estimate] = {}
    for key, values in found.items():
      name = metric_name(key)
      given = np.isfinite(values)
      metrics[name] = Estimate(_mean(values))
      if key not in _HEADLINES or not given.any():
        continue
      metrics[name] = _estimate(
        bootstrap_interval(
          values[given], groups=labels[given], seed=seed, resamples=resamples
        )
      )
      if found is base or key not in base:
        continue
      other = base[key]
      both = given & np.isfinite(other)
      if both.any():
        gains[name] = _estimate(
          paired_bootstrap(
            values[both],
            other[both],
            groups=labels[both],
            seed=seed,
            resamples=resamples,
          )
        )
    modes.append(Mode(mode, _DESCRIPTIONS.get(mode, ''), metrics, gains))
  return tuple(modes)


def _estimate(interval: Interval) -> Estimate:
  return Estimate(interval.mean, interval.low, interval.high)


def _mean(values: Float[np.ndarray, ' q']) -> float:
  """The mean of what is given; NaN if nothing is."""
  given = values[np.isfinite(values)]
  return float(given.mean()) if given.size else float('nan')


def recall_per_class(
  queries: Source, scores: Mapping[str, Scores], names: Sequence[str]
) -> tuple[ClassRecall, ...]:
  """Recall@1 of the queries of each class.

  Args:
    queries: the images that ask.
    scores: by mode and metric.
    names: the mode before re-ranking, and the mode after it if there is one.

  Returns:
    Classes in the order of their labels; none without recall@1.
  """
  recalls = [scores.get(name, {}).get('recall@1') for name in names]
  if recalls[0] is None:
    return ()
  labels = np.asarray(queries.labels)
  rows = []
  for label in np.unique(labels):
    own = labels == label
    before, *after = (None if r is None else _mean(r[own]) for r in recalls)
    if before is None or not np.isfinite(before):
      continue
    rows.append(
      ClassRecall(
        queries.class_names[label],
        int(own.sum()),
        before,
        after[0] if after else None,
      )
    )
  return tuple(rows)
