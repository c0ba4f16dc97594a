r"""Metrics of retrieval as functions of ranks, one number a query.

r₁ < … < r_R are the ranks of a query's positives, counted from 1 by
`positive_ranks`. A query without any positive scores zero.

Attributes:
  Convention: how average precision takes the area.
  recall_at_k, precision_at_k: what is among the best k.
  r_precision, map_at_r: what is among the best R.
  average_precision: over the whole ranking.
  positive_count: R.
"""

from typing import Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float32, Int

from msba_jax.metrics.ranks import ABSENT

__all__ = [
  'Convention',
  'average_precision',
  'map_at_r',
  'positive_count',
  'precision_at_k',
  'r_precision',
  'recall_at_k',
]

Convention: TypeAlias = Literal['precision', 'trapezoidal']


def recall_at_k(
  ranks: Int[np.ndarray, 'q p'], k: int
) -> Float32[np.ndarray, ' q']:
  """One if a positive is among the best k: [r₁ ≤ k].

  Args:
    ranks: of the positives, ascending from 1; `ABSENT` where there are fewer.
    k: how many answers are looked at.

  Returns:
    Zero or one a query.

  Example:
    >>> recall_at_k(np.array([[2, 5]]), 1), recall_at_k(np.array([[2, 5]]), 2)
    (array([0.], dtype=float32), array([1.], dtype=float32))
  """
  return np.asarray((ranks <= k).any(axis=1)).astype(np.float32)


def precision_at_k(
  ranks: Int[np.ndarray, 'q p'], k: int
) -> Float32[np.ndarray, ' q']:
  """Share of positives among the best k: #{i : r_i ≤ k} / k.

  Args:
    ranks: as in `recall_at_k`.
    k: how many answers are looked at.

  Returns:
    One number a query.

  Example:
    >>> precision_at_k(np.array([[2, 4]]), 4)
    array([0.5], dtype=float32)
  """
  return ((ranks <= k).sum(axis=1) / k).astype(np.float32)


def r_precision(ranks: Int[np.ndarray, 'q p']) -> Float32[np.ndarray, ' q']:
  """Precision among the best R, R the number of positives.

  Args:
    ranks: as in `recall_at_k`.

  Returns:
    One number a query.

  Example:
    >>> r_precision(np.array([[1, 3]]))
    array([0.5], dtype=float32)
  """
  count = positive_count(ranks)
  hits = (ranks <= count[:, None]).sum(axis=1)
  return (hits / np.maximum(count, 1)).astype(np.float32)


def map_at_r(ranks: Int[np.ndarray, 'q p']) -> Float32[np.ndarray, ' q']:
  """Average precision cut at R: (1/R) Σ_{i : r_i ≤ R} i / r_i.

  Args:
    ranks: as in `recall_at_k`.

  Returns:
    One number a query.

  Example:
    >>> map_at_r(np.array([[1, 3, 4], [1, 2, 4]])).round(3)
    array([0.556, 0.667], dtype=float32)

  Source:
    Musgrave, Belongie & Lim, A Metric Learning Reality Check, 2020, arXiv
    2003.08505, section 4.4.
  """
  count = positive_count(ranks)
  precision = _precisions(ranks) * (ranks <= count[:, None])
  return (precision.sum(axis=1) / np.maximum(count, 1)).astype(np.float32)


def average_precision(
  ranks: Int[np.ndarray, 'q p'], *, convention: Convention = 'precision'
) -> Float32[np.ndarray, ' q']:
  r"""Area under precision over recall, in one of two conventions.

  `precision` averages the precision at each positive, (1/R) Σ_i i / r_i.
  `trapezoidal` averages it with the precision just before the positive,
  (1/2R) Σ_i (i / r_i + (i − 1) / (r_i − 1)), where 0/0 is one, as the
  evaluations of the Oxford and Paris buildings do.

  Args:
    ranks: as in `recall_at_k`.
    convention: which of the two.

  Returns:
    One number a query.

  Raises:
    ValueError: there is no such convention.

  Example:
    >>> average_precision(np.array([[1, 4]]))
    array([0.75], dtype=float32)

  Source:
    Philbin et al., Object retrieval with large vocabularies and fast spatial
    matching, 2007, for `trapezoidal`.
  """
  if convention not in get_args(Convention):
    raise ValueError(f'{convention=} must be one of {get_args(Convention)}')
  precision = _precisions(ranks)
  if convention == 'trapezoidal':
    earlier = np.arange(ranks.shape[1]) / np.maximum(ranks - 1, 1)
    earlier = np.where(ranks == 1, 1, earlier) * (ranks < ABSENT)
    precision = (precision + earlier) / 2
  total = precision.sum(axis=1) / np.maximum(positive_count(ranks), 1)
  return total.astype(np.float32)


def positive_count(ranks: Int[np.ndarray, 'q p']) -> Int[np.ndarray, ' q']:
  """How many positives a query has.

  Args:
    ranks: as in `recall_at_k`.

  Returns:
    R for each query.
  """
  return (ranks < ABSENT).sum(axis=1)


def _precisions(ranks: np.ndarray) -> np.ndarray:
  """Precision at each positive, float64; zero where there is none."""
  numbers = np.arange(1, ranks.shape[1] + 1)
  return np.where(ranks < ABSENT, numbers / ranks, 0)
