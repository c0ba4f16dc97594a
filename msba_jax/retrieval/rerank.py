"""Refining vectors by their neighbours, and re-ordering results with them.

In the context mode `neighbours` every asking image has its own context: the
regions of its nearest gallery images, found with solo vectors. An image is
refined the same way whether it asks alone or among thousands. The
training-free refinement beside it moves a vector towards its neighbours
without any model, and is the control that every gain is held against.

Attributes:
  refine_by_neighbours: vectors in the context of their neighbours.
  rerank: re-orders the head of result lists.
  neighbour_refinement: the training-free control.
"""

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float16, Float32, Int
from tqdm import tqdm

from msba_jax.data.progress import progress_bar
from msba_jax.retrieval.devices import copy_to_all, local_mesh, spread
from msba_jax.retrieval.embed import Embedder
from msba_jax.retrieval.search import Neighbours, search

__all__ = ['neighbour_refinement', 'refine_by_neighbours', 'rerank']


def refine_by_neighbours(
  embedder: Embedder,
  regions: Float16[np.ndarray, 'n l r d'],
  vectors: Float[np.ndarray, 'n e'],
  gallery_regions: Float16[np.ndarray, 'm l r d'],
  gallery_vectors: Float[np.ndarray, 'm e'],
  *,
  k: int = 20,
  exclude_self: bool = False,
  exclude: Int[np.ndarray, ' n'] | None = None,
  batch_size: int = 64,
  mesh: Mesh | None = None,
  progress: bool = True,
) -> Float32[np.ndarray, 'n e']:
  """Embeds images in the context of their k nearest gallery images.

  A model without in-batch attention gives back the solo vectors.

  Args:
    embedder: the model that made regions and vectors.
    regions: stored regions of the asking images.
    vectors: their solo vectors.
    gallery_regions: stored regions that may answer; may be memory-mapped.
    gallery_vectors: solo vectors of the gallery.
    k: how many neighbours make a context; fewer if the gallery is small.
    exclude_self: the asking images are the gallery, none is its own neighbour.
    exclude: one gallery row for each asking image that is not its neighbour.
    batch_size: how many images ask at the same time.
    mesh: spreads each batch; None takes all devices of this process.
    progress: shows a bar with speed and remaining time.

  Returns:
    Refined unit vectors.

  Raises:
    ValueError: regions and vectors are not of the same images.
  """
  for name, stored, rows in (
    ('regions', regions, vectors),
    ('gallery_regions', gallery_regions, gallery_vectors),
  ):
    if len(stored) != len(rows):
      raise ValueError(
        f'{name} and vectors must be of the same images: '
        f'{stored.shape=} {rows.shape=}'
      )
  if not embedder.model.contextual or len(vectors) == 0:
    return np.asarray(vectors, np.float32)
  mesh = local_mesh() if mesh is None else mesh
  near = search(
    vectors,
    gallery_vectors,
    k,
    mesh=mesh,
    exclude_self=exclude_self,
    exclude=exclude,
  ).indices
  valid = np.arange(k) < near.shape[1]
  near = np.pad(near, ((0, 0), (0, k - near.shape[1])))
  size = min(batch_size, 1 << (len(vectors) - 1).bit_length())
  size = -(-size // mesh.size) * mesh.size
  variables, valid = copy_to_all((embedder.variables, valid), mesh)
  refined = np.empty(vectors.shape, np.float32)
  with progress_bar(
    len(vectors), desc='refine', unit='image', disable=not progress
  ) as bar:
    waiting = None
    for start in range(0, len(vectors), size):
      rows = np.minimum(np.arange(start, start + size), len(vectors) - 1)
      batch = regions[rows], gallery_regions[near[rows]]
      result = embedder.refine(variables, *spread(batch, mesh), valid)
      _collect(refined, waiting, bar)
      waiting = start, result
    _collect(refined, waiting, bar)
  return refined


def _collect(
  refined: np.ndarray, waiting: tuple[int, jax.Array] | None, bar: tqdm
) -> None:
  """Waits for a batch and writes it where it belongs."""
  if waiting is None:
    return
  start, result = waiting
  rows = refined[start : start + len(result)]
  rows[:] = np.asarray(result)[: len(rows)]
  bar.update(len(rows))


def rerank(
  found: Neighbours,
  queries: Float[np.ndarray, 'q e'],
  candidates: Float[np.ndarray, 'q c e'],
) -> Neighbours:
  """Re-orders the first c results of every query; the rest keep their order.

  Args:
    found: results of a search by solo vectors.
    queries: refined vectors of the queries.
    candidates: refined vectors of the first c results, in their order.

  Returns:
    The same results, the first c of them by query · candidate (equal ones as
    they stood). The scores of these are the new products; later scores are
    still those of the search, and the two are not comparable.

  Raises:
    ValueError: there are more candidates than results.
  """
  depth = candidates.shape[1]
  if depth > found.indices.shape[1]:
    raise ValueError(
      f'{candidates.shape=} has more candidates than {found.indices.shape=}'
    )
  scores = np.einsum('qe,qce->qc', queries, candidates).astype(np.float32)
  order = np.argsort(-scores, axis=1, kind='stable')
  head = found.indices[:, :depth]
  return Neighbours(
    np.concatenate(
      [np.take_along_axis(scores, order, axis=1), found.scores[:, depth:]],
      axis=1,
    ),
    np.concatenate(
      [np.take_along_axis(head, order, axis=1), found.indices[:, depth:]],
      axis=1,
    ),
  )


def neighbour_refinement(
  vectors: Float[np.ndarray, 'n e'],
  gallery_vectors: Float[np.ndarray, 'm e'],
  *,
  neighbours: int = 9,
  beta: float = 0.15,
  exclude_self: bool = False,
  mesh: Mesh | None = None,
  block: int = 4096,
) -> Float32[np.ndarray, 'n e']:
  r"""Moves vectors towards their neighbours, without training.

  x̃_c = (x_c + β Σ_n s_cn x_n) / (1 + β Σ_n s_cn), then divided by its norm,
  where x_n are the nearest gallery vectors and s_cn their inner products with
  x_c. The denominator only scales, so the norm takes it out; it is not
  computed, because with negative products it could vanish.

  Args:
    vectors: unit vectors to refine.
    gallery_vectors: unit vectors that may be neighbours.
    neighbours: how many; fewer if the gallery is small.
    beta: how far to move.
    exclude_self: the vectors are the gallery, none is its own neighbour.
    mesh: the devices of the search; None takes all of this process.
    block: how many vectors are moved at the same time.

  Returns:
    Refined unit vectors.

  Source: Global Features are All You Need for Image Retrieval and Reranking
  (2023), arXiv 2308.06954.
  """
  near = search(
    vectors, gallery_vectors, neighbours, mesh=mesh, exclude_self=exclude_self
  )
  refined = np.array(vectors, np.float32)
  for start in range(0, len(refined), block):
    rows = slice(start, start + block)
    refined[rows] += beta * np.einsum(
      'nk,nke->ne', near.scores[rows], gallery_vectors[near.indices[rows]]
    )
  norms = np.linalg.norm(refined, axis=1, keepdims=True)
  return refined / np.where(norms > 0, norms, 1)
