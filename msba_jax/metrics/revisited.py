r"""The revisited Oxford and Paris protocol: easy, medium, hard, with junk.

Every query lists the gallery images that show it easily, with difficulty, or so
badly that they count neither way (junk). A difficulty chooses what is to be
found, and what it ignores is taken out of the ranking before ranks are counted:

| difficulty | positives   | ignored    |
|---|---|---|
| easy       | easy        | junk, hard |
| medium     | easy, hard  | junk       |
| hard       | hard        | junk, easy |

Attributes:
  Relevance: the three lists of a query.
  Difficulty: the three names.
  evaluate_revisited: per-query scores for each difficulty.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from msba_jax.metrics.rank_metrics import average_precision
from msba_jax.metrics.ranks import (
  ABSENT,
  check_embeddings,
  padded_gallery,
  positive_ranks,
  query_block,
)
from msba_jax.metrics.retrieval import Embeddings, RetrievalScores

__all__ = ['Difficulty', 'Relevance', 'evaluate_revisited']

Difficulty: TypeAlias = Literal['easy', 'medium', 'hard']


class Relevance(NamedTuple):
  """Gallery indices that belong to a query; all others are negatives.

  Attributes:
    easy: show the query clearly.
    hard: show it with difficulty.
    junk: count neither way.
  """

  easy: Sequence[int] | np.ndarray = ()
  hard: Sequence[int] | np.ndarray = ()
  junk: Sequence[int] | np.ndarray = ()


def evaluate_revisited(
  queries: Embeddings,
  gallery: Embeddings,
  relevance: Sequence[Relevance],
  *,
  ks: Sequence[int] = (1, 5, 10),
  block: int | None = None,
) -> dict[Difficulty, RetrievalScores]:
  r"""Per-query scores in the easy, medium and hard protocol.

  As in the published evaluation, average precision is `trapezoidal`, and
  precision@k looks no further than the last positive: with k' = min(k, r_R) it
  is #{i : r_i ≤ k'} / k'. A query without positives at a difficulty scores zero
  there, is not `valid`, and takes no part in its means.

  Args:
    queries: embeddings that ask.
    gallery: embeddings that answer.
    relevance: the lists of each query.
    ks: for which k precision@k is wanted.
    block: queries ranked at once, rounded up to a multiple of 8; None lets
      their scores take 64 MiB.

  Returns:
    For each difficulty `ap_trapezoidal`, `precision@k` for each k, and `valid`;
    `summarize` makes mAP and mP@k of them.

  Raises:
    ValueError: shapes that do not fit, embeddings that are not finite, an index
      outside the gallery or twice in the lists of a query.

  Example:
    >>> images = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], np.float32)
    >>> lists = [Relevance(easy=[1], junk=[0])]
    >>> scores = evaluate_revisited(images[:1], images, lists)
    >>> scores['easy']['ap_trapezoidal'].tolist()
    [1.0]

  Source:
    Radenović et al., Revisiting Oxford and Paris: Large-Scale Image Retrieval
    Benchmarking, 2018, arXiv 1803.11285.
  """
  asking, answering = np.asarray(queries), np.asarray(gallery)
  check_embeddings(asking, answering)
  _check(relevance, len(asking), len(answering), ks)
  block = query_block(len(asking), len(answering), block)
  vectors = padded_gallery(answering)
  scores: dict[Difficulty, RetrievalScores] = {}
  for difficulty in ('easy', 'medium', 'hard'):
    chosen, ignored = _lists(relevance, difficulty)
    batches = []
    for start in range(0, len(asking), block):
      rows = np.arange(start, start + block) % len(asking)
      ranks = positive_ranks(
        asking[rows],
        vectors,
        chosen[rows],
        ignored[rows],
        images=len(answering),
      )
      batches.append(ranks[: len(asking) - start])
    scores[difficulty] = _scores(np.concatenate(batches), ks)
  return scores


def _scores(ranks: np.ndarray, ks: Sequence[int]) -> RetrievalScores:
  present = ranks < ABSENT
  last = np.max(ranks, axis=1, initial=1, where=present)
  scores = {
    'ap_trapezoidal': average_precision(ranks, convention='trapezoidal')
  }
  for k in ks:
    deepest = np.minimum(k, last)
    hits = (ranks <= deepest[:, None]).sum(axis=1)
    scores[f'precision@{k}'] = (hits / deepest).astype(np.float32)
  return {**scores, 'valid': np.asarray(present.any(axis=1))}


def _lists(
  relevance: Sequence[Relevance], difficulty: Difficulty
) -> tuple[np.ndarray, np.ndarray]:
  """Positives and ignored images of every query, filled up with −1."""
  found, ignored = {
    'easy': (['easy'], ['junk', 'hard']),
    'medium': (['easy', 'hard'], ['junk']),
    'hard': (['hard'], ['junk', 'easy']),
  }[difficulty]
  return _rectangle(relevance, found), _rectangle(relevance, ignored)


def _rectangle(
  relevance: Sequence[Relevance], kinds: Sequence[str]
) -> np.ndarray:
  rows = [
    np.concatenate([np.asarray(getattr(lists, kind), int) for kind in kinds])
    for lists in relevance
  ]
  array = np.full((len(rows), max(1, *map(len, rows))), -1)
  for row, indices in enumerate(rows):
    array[row, : len(indices)] = indices
  return array


def _check(
  relevance: Sequence[Relevance], queries: int, images: int, ks: Sequence[int]
) -> None:
  """Raises on lists that do not belong to these queries and this gallery."""
  if min(ks, default=1) < 1:
    raise ValueError(f'{ks=} must be at least 1')
  if not queries or len(relevance) != queries:
    raise ValueError(
      f'there are {len(relevance)} lists of relevant images for {queries} '
      'queries'
    )
  for row, lists in enumerate(relevance):
    indices = np.concatenate([np.asarray(x, int) for x in lists])
    outside = indices[(indices < 0) | (indices >= images)]
    if len(outside):
      raise ValueError(
        f'query {row} lists image {outside[0]}, but the gallery has {images}'
      )
    values, counts = np.unique(indices, return_counts=True)
    if (counts > 1).any():
      raise ValueError(
        f'query {row} lists image {values[counts > 1][0]} more than once'
      )
