"""Scores of a model on queries and a gallery, in each mode of asking.

    solo        each image by itself
    neighbours  each image in the context of its nearest gallery images
    memory      each image in the context of a memory
    refinement  solo vectors moved towards their neighbours: the control that
                needs no training

A further one, `classifier`, is that of `score_classification`.

Images are embedded in a shuffled order, so that no batch is sorted by class;
scores come back in the order of the source.

Attributes:
  Mode: the names above.
  ModeVectors: embeddings of queries and gallery in one mode.
  evaluate_modes: scores of each query, by mode and metric.
  embed_modes, score_vectors: its two halves.
  score_classification: scores of images against the proxies of their classes.
  average: means of scores.
  batch_sensitivity: how much the context `batch` depends on the batch, of
    `sensitivity`.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import ArrayLike, Float, Float32, Int

from msba_jax.data.errors import InputError
from msba_jax.data.source import Evaluation, Source, SubsetSource
from msba_jax.layers.normalize import safe_normalize
from msba_jax.metrics import RetrievalScores, evaluate_retrieval
from msba_jax.models.context import solo
from msba_jax.retrieval.embed import Embedded, Embedder, embed
from msba_jax.retrieval.rerank import neighbour_refinement, refine_by_neighbours
from msba_jax.retrieval.sensitivity import batch_sensitivity

__all__ = [
  'Mode',
  'ModeVectors',
  'average',
  'batch_sensitivity',
  'embed_modes',
  'evaluate_modes',
  'score_classification',
  'score_vectors',
]

Mode: TypeAlias = Literal[
  'solo', 'neighbours', 'memory', 'refinement', 'classifier'
]


class ModeVectors(NamedTuple):
  """Embeddings of queries and gallery in one mode.

  Attributes:
    queries: unit vectors.
    gallery: unit vectors; None: the queries answer each other.
  """

  queries: Float32[np.ndarray, 'q e']
  gallery: Float32[np.ndarray, 'm e'] | None


def evaluate_modes(
  embedder: Embedder,
  evaluation: Evaluation,
  *,
  modes: Sequence[Mode] = ('solo', 'neighbours'),
  memory: Any = None,
  neighbours: int = 20,
  batch_size: int = 256,
  seed: int = 0,
  mesh: Mesh | None = None,
  progress: bool = True,
) -> dict[Mode, RetrievalScores]:
  """Scores every query: `embed_modes`, then `score_vectors`.

  Args:
    embedder: the model.
    evaluation: queries and gallery.
    modes: which modes.
    memory: the context of the mode `memory`.
    neighbours: gallery images in a context of the mode `neighbours`.
    batch_size: images embedded at a time.
    seed: of the order in which images are embedded.
    mesh: the devices; None takes all of this process.
    progress: whether bars are shown.

  Returns:
    By mode, by metric: one number a query, in the order of the source; NaN
    where the gallery has no other image of its class.

  Raises:
    InputError: no query has an image of its class to find.
    ValueError: the mode `memory` is asked for without a memory.
  """
  found = embed_modes(
    embedder,
    evaluation,
    modes=modes,
    memory=memory,
    neighbours=neighbours,
    batch_size=batch_size,
    seed=seed,
    mesh=mesh,
    progress=progress,
  )
  return {
    mode: score_vectors(vectors, evaluation) for mode, vectors in found.items()
  }


def embed_modes(
  embedder: Embedder,
  evaluation: Evaluation,
  *,
  modes: Sequence[Mode] = ('solo', 'neighbours'),
  memory: Any = None,
  neighbours: int = 20,
  batch_size: int = 256,
  seed: int = 0,
  mesh: Mesh | None = None,
  progress: bool = True,
) -> dict[Mode, ModeVectors]:
  """Embeds queries and gallery in each mode, the backbone once for most.

  Args:
    embedder: the model.
    evaluation: queries and gallery.
    modes: which modes.
    memory: the context of the mode `memory`.
    neighbours: gallery images in a context of the mode `neighbours`.
    batch_size: images embedded at a time.
    seed: of the order in which images are embedded.
    mesh: the devices; None takes all of this process.
    progress: whether bars are shown.

  Returns:
    By mode, vectors in the order of the source.

  Raises:
    ValueError: the mode `memory` is asked for without a memory, or
      `classifier`, which is no way to embed images.
  """
  if 'classifier' in modes:
    raise ValueError("'classifier' is no way to embed images")
  if 'memory' in modes and memory is None:
    raise ValueError("the mode 'memory' needs a memory")
  embed_all = functools.partial(
    _embed_shuffled,
    embedder,
    batch_size=batch_size,
    seed=seed,
    mesh=mesh,
    progress=progress,
  )
  sources = [s for s in evaluation if s is not None]
  regions = 'neighbours' in modes
  parts = [embed_all(source, keep_regions=regions) for source in sources]
  vectors: dict[Mode, ModeVectors] = {}
  for mode in modes:
    if mode == 'solo':
      found = [part.vectors for part in parts]
    elif mode == 'memory':
      found = [embed_all(s, context=memory).vectors for s in sources]
    else:
      # Queries that answer each other are the gallery.
      found = [
        _refine(
          embedder,
          mode,
          part,
          parts[-1],
          neighbours=neighbours,
          mesh=mesh,
          progress=progress,
        )
        for part in parts
      ]
    vectors[mode] = ModeVectors(found[0], found[1] if found[1:] else None)
  return vectors


def score_vectors(
  vectors: ModeVectors, evaluation: Evaluation
) -> RetrievalScores:
  """Scores every query by the labels of what it finds.

  Args:
    vectors: of queries and gallery.
    evaluation: the same images, for their labels.

  Returns:
    By metric: one number a query; NaN where the gallery has no other image of
    its class.

  Raises:
    InputError: that is so for every query.
  """
  queries, gallery = evaluation
  scores = evaluate_retrieval(
    vectors.queries,
    np.asarray(queries.labels),
    vectors.gallery,
    None if gallery is None else np.asarray(gallery.labels),
  )
  return _finite(scores)


def score_classification(
  vectors: Float32[np.ndarray, 'q e'],
  labels: Int[np.ndarray, ' q'],
  proxies: Float[ArrayLike, 'c e'],
) -> RetrievalScores:
  """Scores images by the rank of the proxy of their class.

  Args:
    vectors: unit vectors of the images.
    labels: which proxy is theirs.
    proxies: one a class, of any length: only their directions count.

  Returns:
    By metric: one number an image. recall@k is the top-k accuracy, ap the
    reciprocal rank.
  """
  rows = np.asarray(safe_normalize(jnp.asarray(proxies)))
  classes = np.arange(len(rows))
  return _finite(evaluate_retrieval(vectors, labels, rows, classes))


def _finite(scores: RetrievalScores) -> RetrievalScores:
  """Scores with NaN where there was nothing to find."""
  valid = scores.pop('valid')
  if not valid.any():
    raise InputError(
      f'none of {len(valid)} queries has another image of its class to find: '
      'evaluate on classes with at least two images'
    )
  return {
    name: np.where(valid, values, np.nan).astype(np.float32)
    for name, values in scores.items()
  }


def average(scores: RetrievalScores) -> dict[str, float]:
  """The mean of each metric over the queries that can be answered.

  Args:
    scores: as `score_vectors` gives them.

  Returns:
    One number a metric; the mean of `ap` is mAP.
  """
  return {
    name: float(np.nanmean(values, dtype=np.float64))
    for name, values in scores.items()
  }


def _embed_shuffled(
  embedder: Embedder,
  source: Source,
  *,
  batch_size: int,
  seed: int,
  mesh: Mesh | None,
  progress: bool,
  context: Any = solo,
  keep_regions: bool = False,
) -> Embedded:
  """Embeds in a shuffled order, returns in the order of the source."""
  order = np.random.default_rng(seed).permutation(len(source))
  found = embed(
    embedder,
    SubsetSource(source, order, classes=range(len(source.class_names))),
    batch_size=batch_size,
    mesh=mesh,
    context=context,
    keep_regions=keep_regions,
    progress=progress,
  )
  back = np.argsort(order)
  return Embedded(
    vectors=found.vectors[back],
    regions=None if found.regions is None else found.regions[back],
    labels=np.asarray(source.labels),
    ids=tuple(source.ids),
  )


def _refine(
  embedder: Embedder,
  mode: Mode,
  asking: Embedded,
  answering: Embedded,
  *,
  neighbours: int,
  mesh: Mesh | None,
  progress: bool,
) -> np.ndarray:
  """Vectors in the light of their nearest answering images."""
  exclude_self = asking is answering
  if mode == 'refinement':
    return neighbour_refinement(
      asking.vectors, answering.vectors, exclude_self=exclude_self, mesh=mesh
    )
  assert asking.regions is not None
  assert answering.regions is not None
  return refine_by_neighbours(
    embedder,
    asking.regions,
    asking.vectors,
    answering.regions,
    answering.vectors,
    k=neighbours,
    exclude_self=exclude_self,
    mesh=mesh,
    progress=progress,
  )
