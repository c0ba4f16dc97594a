"""Exact nearest neighbours of many queries in a gallery of any size.

The gallery is cut into pieces that fit on the devices; a piece is spread over
the mesh, every device finds the exact best of its share, and the best of all
are merged with the best of the pieces before. Equal scores are ordered by
index, so the answer is the same on any number of devices. A memory-mapped
gallery is read piece by piece while the devices compute.

Attributes:
  Neighbours: scores and indices, best first.
  search: the exact search.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Float32, Int, Int64

from msba_jax.layers.nearest import LANES, exact_topk
from msba_jax.retrieval.devices import (
  DATA_AXIS,
  copy_to_all,
  local_mesh,
  spread,
)

__all__ = ['Neighbours', 'search']

# Queries that a device scores at once, and gallery rows that it holds at once.
QUERY_ROWS = 1024
PIECE_BYTES = 256 * 2**20


class Neighbours(NamedTuple):
  """What was found, best first.

  Attributes:
    scores: inner products.
    indices: rows of the gallery.
  """

  scores: Float32[np.ndarray, 'q k']
  indices: Int64[np.ndarray, 'q k']


def search(
  queries: Float[np.ndarray, 'q e'],
  gallery: Float[np.ndarray, 'n e'],
  k: int,
  *,
  block: int = 8192,
  mesh: Mesh | None = None,
  exclude_self: bool = False,
  exclude: Int[np.ndarray, ' q'] | None = None,
  piece_bytes: int = PIECE_BYTES,
) -> Neighbours:
  """The k rows of the gallery with the greatest inner product, exactly.

  Args:
    queries: what is asked.
    gallery: what answers; may be memory-mapped and larger than any memory.
    k: how many answers; no more than there are rows are given.
    block: gallery rows whose scores exist at the same time on a device.
    mesh: the devices; None takes all of this process.
    exclude_self: queries and gallery are the same rows, and no row answers
      itself.
    exclude: one row of the gallery for each query that must not answer it.
    piece_bytes: how much of the gallery a device holds at the same time.

  Returns:
    Scores and indices, (q, min(k, n)), or (q, min(k, n − 1)) if a row is
    excluded.

  Raises:
    ValueError: the shapes do not fit, or k or the block is not positive.

  Example:
    >>> rows = np.eye(3, dtype=np.float32)
    >>> search(rows, rows, 1).indices.ravel().tolist()
    [0, 1, 2]
  """
  exclude = _check(queries, gallery, k, block, exclude_self, exclude)
  number, count = len(gallery), len(queries)
  k = max(min(k, number - (exclude is not None)), 0)
  if count == 0 or k == 0:
    empty = np.zeros((count, k), np.float32)
    return Neighbours(empty, empty.astype(np.int64))
  mesh = local_mesh() if mesh is None else mesh
  # Shapes follow from the data alone: products round alike on any mesh.
  rows = min(_power_of_two(count), QUERY_ROWS)
  block = -(-min(block, _power_of_two(number)) // LANES) * LANES
  share = block * min(
    -(-number // (block * mesh.size)),
    max(piece_bytes // (4 * gallery.shape[1] * block), 1),
  )
  asked = copy_to_all(
    [_ask(queries, exclude, start, rows) for start in range(0, count, rows)],
    mesh,
  )
  found = copy_to_all([_nothing(rows, k)] * len(asked), mesh)
  step = _compiled_step(mesh, k, block)
  for start in range(0, number, share * mesh.size):
    piece = spread(_piece(gallery, start, share * mesh.size), mesh)
    before = found
    found = [
      step(*ask, *piece, np.int32(start), *best)
      for ask, best in zip(asked, before, strict=True)
    ]
    # One piece is computed while the next is read, and no more are held.
    jax.block_until_ready(before)
  scores, indices = (
    np.concatenate([np.asarray(best[i]) for best in found])[:count]
    for i in range(2)
  )
  return Neighbours(scores, indices.astype(np.int64))


def _check(
  queries: np.ndarray,
  gallery: np.ndarray,
  k: int,
  block: int,
  exclude_self: bool,
  exclude: np.ndarray | None,
) -> np.ndarray | None:
  """Raises on what does not fit; the excluded row of every query, or None."""
  if queries.shape[1] != gallery.shape[1]:
    raise ValueError(
      'queries and gallery must have one embedding size: '
      f'{queries.shape=} {gallery.shape=}'
    )
  if k < 1 or block < 1:
    raise ValueError(f'{k=} and {block=} must be positive')
  if not exclude_self:
    if exclude is not None and len(exclude) != len(queries):
      raise ValueError(f'{exclude.shape=} must name a row for {len(queries)=}')
    return exclude
  if exclude is not None:
    raise ValueError('give exclude_self or exclude, not both')
  if len(queries) != len(gallery):
    raise ValueError(
      'exclude_self needs the same rows as queries and gallery: '
      f'{queries.shape=} {gallery.shape=}'
    )
  return np.arange(len(queries))


def _power_of_two(number: int) -> int:
  """The smallest power of two that is not smaller."""
  return 1 << (number - 1).bit_length()


def _ask(
  queries: np.ndarray, exclude: np.ndarray | None, start: int, rows: int
) -> tuple[np.ndarray, np.ndarray]:
  """Some queries and their excluded rows (−1: none), filled up to `rows`."""
  asked = np.zeros((rows, queries.shape[1]), np.float32)
  excluded = np.full(rows, -1, np.int32)
  chosen = queries[start : start + rows]
  asked[: len(chosen)] = chosen
  if exclude is not None:
    excluded[: len(chosen)] = exclude[start : start + rows]
  return asked, excluded


def _nothing(rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
  return np.full((rows, k), -np.inf, np.float32), np.full(
    (rows, k), -1, np.int32
  )


def _piece(
  gallery: np.ndarray, start: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Gallery rows from `start`, filled up to `size`, and which are real."""
  rows = np.asarray(gallery[start : start + size], np.float32)
  valid = np.arange(size) < len(rows)
  if len(rows) < size:
    rows = np.concatenate(
      [rows, np.zeros((size - len(rows), rows.shape[1]), np.float32)]
    )
  return rows, valid


@functools.lru_cache(maxsize=64)
def _compiled_step(mesh: Mesh, k: int, block: int) -> Any:
  """`(queries, exclude, rows, valid, start, scores, indices) → the last two`.

  Takes the best of a spread piece and merges it with the best so far.
  """

  def best_of_share(queries, exclude, rows, valid, start):
    first = start + jax.lax.axis_index(DATA_AXIS) * len(rows)
    scores, indices = exact_topk(
      queries, rows, k, valid=valid, exclude=exclude - first, block=block
    )
    return scores, jnp.where(indices < 0, -1, indices + first)

  every, split = PartitionSpec(), PartitionSpec(DATA_AXIS)
  best_of_piece = jax.shard_map(
    best_of_share,
    mesh=mesh,
    in_specs=(every, every, split, split, every),
    out_specs=PartitionSpec(None, DATA_AXIS),
    check_vma=False,  # the scan of exact_topk starts from constants
  )

  def step(queries, exclude, rows, valid, start, scores, indices):
    new = best_of_piece(queries, exclude, rows, valid, start)
    # Earlier rows stand first: among equal scores top_k takes the first.
    scores, indices = jax.lax.with_sharding_constraint(
      (
        jnp.concatenate([scores, new[0]], axis=1),
        jnp.concatenate([indices, new[1]], axis=1),
      ),
      NamedSharding(mesh, every),
    )
    scores, chosen = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(indices, chosen, axis=1)

  return jax.jit(step)
