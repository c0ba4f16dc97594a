r"""Evaluation of embeddings by label: recall@k, R-precision, MAP@R and mAP.

A positive of a query is a gallery image with its label. There is one number a
query, so that queries can be resampled. A query without any positive scores
zero everywhere, is not `valid`, and takes no part in a mean.

Attributes:
  RetrievalScores: per-query arrays by the name of their metric.
  evaluate_retrieval: all metrics of a set of embeddings.
  summarize: their means over the valid queries.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import numpy as np
from jaxtyping import Float, Shaped

from msba_jax.metrics.rank_metrics import (
  average_precision,
  map_at_r,
  positive_count,
  precision_at_k,
  r_precision,
  recall_at_k,
)
from msba_jax.metrics.ranks import (
  check_embeddings,
  padded_gallery,
  positive_ranks,
  query_block,
)

__all__ = ['RetrievalScores', 'evaluate_retrieval', 'summarize']

RetrievalScores: TypeAlias = dict[str, np.ndarray]
Embeddings: TypeAlias = Float[np.ndarray, '_ d'] | Float[jax.Array, '_ d']
Labels: TypeAlias = Shaped[np.ndarray, ' _'] | Shaped[jax.Array, ' _']


def evaluate_retrieval(
  queries: Embeddings,
  query_labels: Labels,
  gallery: Embeddings | None = None,
  gallery_labels: Labels | None = None,
  *,
  ks: Sequence[int] = (1, 2, 4, 8),
  block: int | None = None,
) -> RetrievalScores:
  """Per-query scores of a retrieval by inner product.

  Equal scores are ranked by gallery index, as `exact_topk` orders them. Time
  grows with queries × gallery × positives of a query; memory is `block` ×
  gallery, on the default device.

  Args:
    queries: embeddings that ask; unit norm makes the product a cosine.
    query_labels: their classes.
    gallery: embeddings that answer. None: the queries answer each other, and no
      image answers itself.
    gallery_labels: their classes.
    ks: for which k recall@k is wanted.
    block: queries ranked at once, rounded up to a multiple of 8; None lets
      their scores take 64 MiB.

  Returns:
    float32 arrays (queries,): `recall@k` for each k, `precision@1`,
    `r_precision`, `map@r`, `ap` (convention `precision`), `ap_trapezoidal`; and
    the Boolean `valid`, False for a query without any positive.

  Raises:
    ValueError: shapes that do not fit, embeddings that are not finite, no
      queries, a gallery without labels, or a k or block below one.

  Example:
    >>> images = np.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]], np.float32)
    >>> scores = evaluate_retrieval(images, np.array([0, 0, 1]))
    >>> scores['ap'].tolist(), scores['valid'].tolist()
    ([1.0, 0.5, 0.0], [True, True, False])
  """
  if (gallery is None) != (gallery_labels is None):
    raise ValueError('gallery and gallery_labels come together')
  if min(ks, default=1) < 1:
    raise ValueError(f'{ks=} must be at least 1')
  own = gallery is None
  asking, asking_labels = np.asarray(queries), np.asarray(query_labels)
  answering, answering_labels = (
    (asking, asking_labels)
    if gallery is None
    else (np.asarray(gallery), np.asarray(gallery_labels))
  )
  _check(asking, asking_labels, answering, answering_labels)
  relevant = _Relevant(asking_labels, answering_labels, own=own)
  block = query_block(len(asking), len(answering), block)
  vectors = padded_gallery(answering)
  scores: RetrievalScores = {}
  # Queries of alike many positives go together, so that little is padded.
  order = np.argsort(relevant.counts, kind='stable')
  for start in range(0, len(order), block):
    batch = order[start : start + block]
    rows = np.resize(batch, block)  # the last batch repeats itself
    ranks = positive_ranks(
      asking[rows],
      vectors,
      relevant.positives(rows),
      rows[:, None] if own else np.full((block, 1), -1),
      images=len(answering),
    )
    for name, values in _scores(ranks[: len(batch)], ks).items():
      array = scores.setdefault(name, np.zeros(len(asking), values.dtype))
      array[batch] = values
  return scores


def summarize(scores: RetrievalScores) -> dict[str, float]:
  """Means over the queries that have a positive.

  Args:
    scores: per-query arrays with their `valid`, as `evaluate_retrieval` gives.

  Returns:
    The mean of each metric; the mean of `ap` is mAP. `valid` is left out.

  Raises:
    ValueError: no query has a positive.

  Example:
    >>> valid = np.array([True, False])
    >>> summarize({'ap': np.array([1.0, 0.0]), 'valid': valid})
    {'ap': 1.0}
  """
  valid = scores['valid']
  if not valid.any():
    raise ValueError(
      f'none of {len(valid)} queries has an image of its class in the gallery'
    )
  return {
    name: float(np.mean(values[valid], dtype=np.float64))
    for name, values in scores.items()
    if name != 'valid'
  }


class _Relevant:
  """The positives of every query, listed a batch at a time."""

  def __init__(
    self, query_labels: np.ndarray, gallery_labels: np.ndarray, *, own: bool
  ):
    self._order = np.argsort(gallery_labels, kind='stable')
    ordered = gallery_labels[self._order]
    self._starts = np.searchsorted(ordered, query_labels, 'left')
    ends = np.searchsorted(ordered, query_labels, 'right')
    self.counts = ends - self._starts - own
    # Where a query stands in the list of its own class; behind it if nowhere.
    self._places = self.counts + 1
    if own:
      self._places = np.argsort(self._order, kind='stable') - self._starts

  def positives(self, rows: np.ndarray) -> np.ndarray:
    """Gallery indices (rows, most positives), −1 behind the last."""
    counts = self.counts[rows, None]
    column = np.arange(max(1, counts.max()))[None, :]
    place = column + (column >= self._places[rows, None])
    place = np.minimum(self._starts[rows, None] + place, len(self._order) - 1)
    return np.where(column < counts, self._order[place], -1)


def _scores(ranks: np.ndarray, ks: Sequence[int]) -> RetrievalScores:
  return {
    **{f'recall@{k}': recall_at_k(ranks, k) for k in ks},
    'precision@1': precision_at_k(ranks, 1),
    'r_precision': r_precision(ranks),
    'map@r': map_at_r(ranks),
    'ap': average_precision(ranks),
    'ap_trapezoidal': average_precision(ranks, convention='trapezoidal'),
    'valid': positive_count(ranks) > 0,
  }


def _check(
  queries: np.ndarray,
  query_labels: np.ndarray,
  gallery: np.ndarray,
  gallery_labels: np.ndarray,
) -> None:
  """Raises on embeddings and labels that do not fit together."""
  check_embeddings(queries, gallery)
  for name, vectors, labels in (
    ('query', queries, query_labels),
    ('gallery', gallery, gallery_labels),
  ):
    if not len(vectors):
      raise ValueError(f'there are no {name} images: {vectors.shape}')
    if labels.shape != vectors.shape[:1]:
      raise ValueError(
        f'{name} labels must be one per image, {vectors.shape[:1]}: '
        f'{labels.shape}'
      )
