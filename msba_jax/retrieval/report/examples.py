"""Queries, results and a batch, as pictures.

Attributes:
  Examples: queries with their results.
  draw_batch: the images whose attention is shown.
  batch_attention: who looks at whom among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from msba_jax.data.prefetch import load_batch
from msba_jax.data.source import Evaluation, Source
from msba_jax.models import context as contexts
from msba_jax.retrieval.embed import Embedder
from msba_jax.retrieval.report.data import (
  Answers,
  AttentionMap,
  Hit,
  Picture,
  QueryResult,
)
from msba_jax.retrieval.report.summaries import Scores
from msba_jax.retrieval.search import Neighbours


class Examples:
  """Queries with their results, as pictures.

  Args:
    pictures: queries and gallery, as uint8 images.
    scores: by mode and metric.
    results: the best results of every query, by one mode or two.
  """

  def __init__(
    self,
    pictures: Evaluation,
    scores: Mapping[str, Scores],
    results: Mapping[str, Neighbours],
  ):
    self._queries = pictures.queries
    self._gallery = pictures.queries
    if pictures.gallery is not None:
      self._gallery = pictures.gallery
    self._results = results
    self._precision = {
      mode: found['ap'] for mode, found in scores.items() if 'ap' in found
    }

  def asking(self, index: int) -> Picture:
    """The query of an index."""
    return _picture(self._queries, index)

  def query(self, index: int, hits: int) -> QueryResult:
    """A query with so many results of every mode."""
    before, *after = (self._answers(m, index, hits) for m in self._results)
    return QueryResult(self.asking(index), before, after[0] if after else None)

  def hardest(self, count: int) -> list[int]:
    """The lowest average precision before re-ranking, one of a class."""
    precision = self._precision.get(next(iter(self._results)))
    if precision is None:
      return []
    labels = np.asarray(self._queries.labels)
    chosen: dict[int, int] = {}
    for index in np.argsort(precision, kind='stable'):
      if len(chosen) == count or not np.isfinite(precision[index]):
        break
      chosen.setdefault(int(labels[index]), int(index))
    return list(chosen.values())

  def _answers(self, mode: str, index: int, hits: int) -> Answers:
    found = self._results[mode]
    label = int(self._queries.labels[index])
    real = found.indices[index][np.isfinite(found.scores[index])]
    right = np.asarray(self._gallery.labels)[real] == label
    ranks = np.flatnonzero(right)
    precision = self._precision.get(mode, np.full(index + 1, np.nan))[index]
    return Answers(
      tuple(
        Hit(_picture(self._gallery, int(i)), float(s), bool(r))
        for i, s, r in zip(
          real[:hits], found.scores[index], right, strict=False
        )
      ),
      float(precision) if np.isfinite(precision) else None,
      int(ranks[0]) + 1 if ranks.size else None,
    )


def _picture(source: Source, index: int) -> Picture:
  record = source[index]
  return Picture(
    np.asarray(record['image'], np.uint8),
    source.ids[index],
    source.class_names[int(record['label'])],
  )


def draw_batch(
  labels: Int[np.ndarray, ' q'],
  rng: np.random.Generator,
  classes: int,
  images: int,
) -> Int[np.ndarray, ' b']:
  """Draws a batch with images of a class side by side.

  Args:
    labels: class of every image.
    rng: draws.
    classes: how many; less if there are fewer.
    images: of each; less if a class has fewer.

  Returns:
    Indices of images.
  """
  drawn = rng.permutation(np.unique(labels))[:classes]
  parts = [
    rng.permutation(np.flatnonzero(labels == label))[:images] for label in drawn
  ]
  return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def batch_attention(
  embedder: Embedder,
  source: Source,
  examples: Examples,
  indices: Int[np.ndarray, ' b'],
) -> AttentionMap | None:
  """Attention of a batch, averaged over all axes but the two of images.

  Args:
    embedder: the model.
    source: what it reads.
    examples: the same images as pictures.
    indices: the batch.

  Returns:
    The attention; None if the model has none, or if nobody can look at
    another.
  """
  if len(indices) < 2:
    return None
  images = load_batch(source, indices)['image']

  @jax.jit
  def look(variables: Any, images: Any) -> Any:
    context = contexts.batch(jnp.ones(len(indices), bool))
    _, out = embedder.apply(variables, images, context)
    return out.get('attention')

  attention = look(embedder.variables, images)
  if attention is None:
    return None
  weights = np.asarray(attention, np.float64)
  weights = weights.reshape(-1, *weights.shape[-2:]).mean(axis=0)
  own = weights[:, : len(indices)]
  return AttentionMap(tuple(examples.asking(int(i)) for i in indices), own)
