"""On whom an image depends: the causal graph of a batch, and what if.

The graph is what the model says. What a query loses with an image of its
context is computed anew without that image, and asks nothing of the graph.

Attributes:
  batch_graph: the graph of a batch, level by level.
  leave_each_out: a query without each image of its context in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float16, Int

from msba_jax.data.prefetch import load_batch
from msba_jax.data.source import Evaluation, Source, SubsetSource
from msba_jax.metrics.rank_metrics import average_precision
from msba_jax.metrics.ranks import padded_gallery, positive_ranks
from msba_jax.models import context as contexts
from msba_jax.retrieval.embed import Embedder, embed
from msba_jax.retrieval.evaluate import ModeVectors
from msba_jax.retrieval.report.data import CausalMap, LeftOut, WhatIf
from msba_jax.retrieval.report.examples import Examples
from msba_jax.retrieval.search import search


def batch_graph(
  embedder: Embedder,
  source: Source,
  examples: Examples,
  indices: Int[np.ndarray, ' b'],
) -> CausalMap | None:
  """The causal graph of a batch, level by level.

  Args:
    embedder: the model.
    source: what it reads.
    examples: the same images as pictures.
    indices: the batch.

  Returns:
    The graph; None if the model has none, or if there are no two images.
  """
  if len(indices) < 2 or not _is_causal(embedder, source):
    return None
  count = len(indices)

  @jax.jit
  def graph(variables: Any, regions: jax.Array) -> jax.Array:
    _, out = embedder.model.apply(
      variables,
      regions,
      context=contexts.batch(jnp.ones(count, bool)),
      method='refine',
    )
    return _told(out)['graph']

  regions = _regions_of(embedder, source, indices)
  weights = np.asarray(
    graph(embedder.variables, _levels_first(regions)), np.float64
  )
  return CausalMap(tuple(examples.asking(int(i)) for i in indices), weights)


def leave_each_out(
  embedder: Embedder,
  evaluation: Evaluation,
  pictures: Evaluation,
  candidates: Sequence[int],
  vectors: tuple[ModeVectors, ModeVectors],
  *,
  neighbours: int,
) -> WhatIf | None:
  """A query without each image of its context in turn, computed anew.

  The query asks in the mode `neighbours`. The gallery's vectors stay as they
  are: only the query's own context loses an image.

  Args:
    embedder: a model with a causal graph.
    evaluation: what it reads.
    pictures: the same queries and gallery as uint8 images.
    candidates: queries; the first that has an image of its class to find asks.
    vectors: of the mode `solo`, which say who is a neighbour, and of the mode
      `neighbours`, which are searched.
    neighbours: how many make a context.

  Returns:
    The query; None if none of the candidates has something to find.
  """
  queries, gallery = evaluation
  solo, refined = vectors
  own = gallery is None
  source = queries if gallery is None else gallery
  labels, answers = np.asarray(queries.labels), np.asarray(source.labels)
  for query in candidates:
    positives = np.flatnonzero(answers == labels[query])
    positives = positives[positives != query] if own else positives
    if len(positives):
      break
  else:
    return None
  near = search(
    solo.queries[query : query + 1],
    solo.queries if solo.gallery is None else solo.gallery,
    neighbours,
    exclude=np.array([query]) if own else None,
  ).indices[0]
  embeddings, scores = _without_each(
    embedder,
    _regions_of(embedder, queries, np.array([query])),
    _regions_of(embedder, source, near),
  )
  searched = refined.queries if refined.gallery is None else refined.gallery
  ranks = positive_ranks(
    embeddings,
    padded_gallery(searched),
    np.tile(positives, (len(embeddings), 1)),
    np.full((len(embeddings), 1), query if own else -1),
    images=len(searched),
  )
  precision, first = average_precision(ranks), ranks[:, 0]
  cosines = np.clip(embeddings[1:] @ embeddings[0], -1, 1)
  shown = pictures.queries if pictures.gallery is None else pictures.gallery
  asking, answering = (
    Examples(Evaluation(part, None), {}, {}).asking
    for part in (pictures.queries, shown)
  )
  return WhatIf(
    asking(query),
    float(precision[0]),
    int(first[0]),
    tuple(
      LeftOut(
        answering(int(near[i])),
        bool(answers[near[i]] == labels[query]),
        float(scores[i]),
        float(cosines[i]),
        float(precision[1 + i]),
        int(first[1 + i]),
      )
      for i in np.argsort(cosines, kind='stable')
    ),
  )


def _without_each(
  embedder: Embedder,
  regions: Float16[np.ndarray, '1 l r d'],
  neighbours: Float16[np.ndarray, 'k l r d'],
) -> tuple[Float[np.ndarray, 'k+1 e'], Float[np.ndarray, ' k']]:
  """Embeddings with the whole context, then without each; causal scores."""

  @jax.jit
  def refine(
    variables: Any, regions: jax.Array, neighbours: jax.Array, valid: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    def one(valid: jax.Array) -> tuple[jax.Array, jax.Array]:
      embeddings, out = embedder.model.apply(
        variables,
        regions,
        context=contexts.Context(neighbours, valid),
        method='refine',
      )
      return embeddings[0], _told(out)['scores'][:, 0].mean(axis=0)

    embeddings, scores = jax.vmap(one)(valid)
    return embeddings, scores[0]

  k = len(neighbours)
  valid = np.concatenate([np.ones((1, k), bool), ~np.eye(k, dtype=bool)])
  embeddings, scores = refine(
    embedder.variables, _levels_first(regions), _levels_first(neighbours), valid
  )
  return np.asarray(embeddings, np.float32), np.asarray(scores, np.float64)


def _is_causal(embedder: Embedder, source: Source) -> bool:
  """Whether the model tells of a causal graph; nothing is computed for it."""
  if not embedder.model.contextual:
    return False
  images = load_batch(source, np.zeros(1, np.int64))['image']
  _, regions = jax.eval_shape(
    functools.partial(embedder.compiled, keep_regions=True),
    embedder.variables,
    images,
    contexts.solo,
  )

  def tell(variables: Any, regions: jax.Array) -> Any:
    _, out = embedder.model.apply(
      variables,
      _levels_first(regions),
      context=contexts.batch(jnp.ones(1, bool)),
      method='refine',
    )
    return _told(out)

  return {'graph', 'scores'} <= set(
    jax.eval_shape(tell, embedder.variables, regions)
  )


def _told(out: Any) -> Any:
  """What the graph of a model tells of itself."""
  return out.get('aux', {}).get('graph', {})


def _levels_first(regions: Any) -> jax.Array:
  """Stored regions (n, l, r, d) as a model takes them."""
  return jnp.moveaxis(jnp.asarray(regions, jnp.float32), 0, 1)


def _regions_of(
  embedder: Embedder, source: Source, indices: Int[np.ndarray, ' n']
) -> Float16[np.ndarray, 'n l r d']:
  """Regions of some images, as the mode `neighbours` stores them."""
  some = SubsetSource(source, indices, classes=range(len(source.class_names)))
  found = embed(embedder, some, keep_regions=True, progress=False)
  assert found.regions is not None
  return found.regions
