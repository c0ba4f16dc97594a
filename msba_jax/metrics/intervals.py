r"""Intervals by resampling seeds, classes and queries at once.

A mean over queries of one test set and a few trainings is uncertain for three
reasons: other seeds, other classes, other images of these classes. A resample
draws all three with replacement: seeds; classes; and, inside every drawn class,
as many queries as it has. Seeds and queries are crossed, not nested: the drawn
queries are the same under every drawn seed, as they are in an experiment.

Attributes:
  Interval: a mean and the interval around it.
  bootstrap_interval: the interval of one system.
  paired_bootstrap: the interval of the difference of two systems.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

__all__ = ['Interval', 'bootstrap_interval', 'paired_bootstrap']

# Drawn queries that are held at once: tens of MiB with their indices.
DRAWS = 2**20


class Interval(NamedTuple):
  """A mean and the percentile interval of its resamples.

  Attributes:
    mean: the mean of all values as they are.
    low: the lower end.
    high: the upper end.
  """

  mean: float
  low: float
  high: float


def bootstrap_interval(
  values: Float[np.ndarray, '*s q'],
  *,
  groups: Shaped[np.ndarray, ' q'] | None = None,
  seed: int,
  resamples: int = 2000,
  confidence: float = 0.95,
) -> Interval:
  """Percentile interval of a mean over seeds, classes and queries.

  Args:
    values: one number a query, or a row of them for every training seed.
      Queries that a metric leaves out must be left out here as well.
    groups: class of every query; None resamples queries alone, as if each were
      its own class.
    seed: of the resampling; the same seed gives the same interval.
    resamples: how often to draw.
    confidence: share of resamples that the interval encloses.

  Returns:
    `Interval(mean, low, high)`. Resampling inside of resampled classes widens
    it slightly, never narrows it; with one seed it says nothing about others.

  Raises:
    ValueError: no values, values that are not finite, groups of another
      length, `resamples` below one, or a confidence outside (0, 1).

  Example:
    >>> hits = np.array([1.0, 0.0, 1.0, 1.0])
    >>> bootstrap_interval(hits, seed=0).mean
    0.75

  Source:
    Davison & Hinkley, Bootstrap Methods and their Application, 1997, section
    3.8; Saravanan, Berman & Sober, Application of the hierarchical bootstrap to
    multi-level data in neuroscience, 2020, arXiv 2007.07797.
  """
  values = np.atleast_2d(np.asarray(values, np.float64))
  groups = np.arange(values.shape[-1]) if groups is None else np.asarray(groups)
  _check(values, groups, resamples, confidence)
  means = _resampled_means(values, groups, seed, resamples)
  tail = (1 - confidence) / 2
  low, high = np.quantile(means, [tail, 1 - tail])
  return Interval(float(values.mean()), float(low), float(high))


def paired_bootstrap(
  a: Float[np.ndarray, '*s q'],
  b: Float[np.ndarray, '*s q'],
  *,
  groups: Shaped[np.ndarray, ' q'] | None = None,
  seed: int,
  resamples: int = 2000,
  confidence: float = 0.95,
) -> Interval:
  """Percentile interval of mean(a) − mean(b) over the same seeds and queries.

  Every resample draws the same seeds, classes and queries for both, so what is
  hard for both cancels. The two differ when the interval leaves out zero.

  Args:
    a: as in `bootstrap_interval`.
    b: of another system; same shape, and its entries belong to those of `a`.
    groups: as in `bootstrap_interval`.
    seed: as in `bootstrap_interval`.
    resamples: as in `bootstrap_interval`.
    confidence: as in `bootstrap_interval`.

  Returns:
    The `Interval` of the difference.

  Raises:
    ValueError: the shapes differ, or as in `bootstrap_interval`.

  Example:
    >>> better = np.array([1.0, 0.5, 0.75, 1.0])
    >>> paired_bootstrap(better, better - 0.25, seed=0)
    Interval(mean=0.25, low=0.25, high=0.25)
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape:
    raise ValueError(f'a pair needs one shape: {a.shape=}, {b.shape=}')
  return bootstrap_interval(
    a - b,
    groups=groups,
    seed=seed,
    resamples=resamples,
    confidence=confidence,
  )


def _resampled_means(
  values: np.ndarray, groups: np.ndarray, seed: int, resamples: int
) -> np.ndarray:
  """The mean of every resample, (resamples,)."""
  generator = np.random.default_rng(seed)
  order = np.argsort(groups, kind='stable')
  sizes = np.unique(groups, return_counts=True)[1]
  starts = np.cumsum(sizes) - sizes
  # One row a query, so that a drawn query is read in one piece.
  columns = np.ascontiguousarray(values[:, order].T)
  seeds = len(values)
  means = []
  step = max(1, DRAWS // values.shape[1])
  for first in range(0, resamples, step):
    count = min(step, resamples - first)
    # How often a seed is drawn is its weight in the mean over seeds.
    weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), count)
    classes = generator.integers(len(sizes), size=(count, len(sizes)))
    drawn = sizes[classes]
    totals = drawn.sum(axis=1)
    ends = np.cumsum(totals)
    size = np.repeat(drawn.ravel(), drawn.ravel())
    start = np.repeat(starts[classes].ravel(), drawn.ravel())
    # A float64 below one times a size never rounds up to the size.
    places = start + (generator.random(len(size)) * size).astype(np.int64)
    sums = np.add.reduceat(columns[places], ends - totals, axis=0)
    means.append((sums * weights).sum(axis=1) / (totals * seeds))
  return np.concatenate(means)


def _check(
  values: np.ndarray, groups: np.ndarray, resamples: int, confidence: float
) -> None:
  """Raises on values and options that no interval can come from."""
  if values.ndim > 2 or not values.size:
    raise ValueError(
      f'values must be (queries,) or (seeds, queries), not {values.shape}'
    )
  if not np.isfinite(values).all():
    raise ValueError(
      f'{np.sum(~np.isfinite(values))} of {values.size} values are not finite; '
      'leave out the queries that have no score'
    )
  if groups.shape != values.shape[-1:]:
    raise ValueError(
      f'{groups.shape=} must be one class per query, {values.shape[-1:]}'
    )
  if resamples < 1 or not 0 < confidence < 1:
    raise ValueError(
      f'{resamples=} must be at least 1 and {confidence=} between 0 and 1'
    )
