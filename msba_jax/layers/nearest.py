r"""Exact nearest neighbours by inner product, a block of the gallery at a time.

The best k of every query so far travel through a scan over blocks of the
gallery, so memory is q · (block + k) scores and never q · n. On a CPU the
blocks are tiles that the cache holds, and only scores that can still be among
the best leave it (`msba_jax.layers.reservoir`). Nothing is approximate:
products accumulate in float32 at the highest precision, and among equal scores
the lower index comes first.

Attributes:
  Neighbours: scores and indices, best first.
  inner_products: the scores of a block.
  exact_topk: the k best of a gallery for every query.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msba_jax.layers.reservoir import (
  Reservoir,
  comparable,
  drain,
  pour,
  reservoir,
)
from msba_jax.layers.varying import varying_alike, varying_like

__all__ = ['LANES', 'ROWS', 'Neighbours', 'exact_topk', 'inner_products']

# Matrix products treat the columns and rows that do not fill a register
# differently, and an image that stands twice in a gallery would score an ulp
# more at one place than at the other. Whole multiples of these two sizes give
# every pair the same arithmetic wherever it stands.
LANES = 128
ROWS = 8

# Queries that a processor with caches treats at once, and the vectors of the
# gallery: 4 MiB of scores.
CHUNK = 1024
TILE = 1024
# Fewer queries, or more answers, are faster sorted block by block there too.
MIN_STREAM = 64
MAX_STREAM = 256


class Neighbours(NamedTuple):
  """The best candidates of every query, best first.

  Attributes:
    scores: inner products; minus infinity where there was no candidate left.
    indices: positions in the gallery; −1 where there was no candidate left.
  """

  scores: Float[Array, 'q k']
  indices: Int[Array, 'q k']


def inner_products(
  queries: Float[Array, 'q d'], gallery: Float[Array, 'n d']
) -> Float[Array, 'q n']:
  """All products of two sets of vectors, in float32 at highest precision.

  Args:
    queries: vectors that ask.
    gallery: vectors that answer.

  Returns:
    One float32 score a pair.
  """
  return jax.lax.dot_general(
    queries.astype(jnp.float32),
    gallery.astype(jnp.float32),
    (((1,), (1,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
  )


def exact_topk(
  queries: Float[Array, 'q d'],
  gallery: Float[Array, 'n d'],
  k: int,
  *,
  valid: Bool[Array, ' n'] | None = None,
  exclude: Int[Array, ' q'] | None = None,
  block: int = 4096,
) -> Neighbours:
  r"""The k gallery vectors of largest inner product, exactly.

  Candidates are ordered by score, then by lower index, whatever the block.
  A score that is NaN or −∞ never answers.

  Args:
    queries: vectors that ask.
    gallery: vectors that answer; n need not be a multiple of `block`.
    k: how many answers a query gets; may exceed n.
    valid: False keeps a gallery vector from answering anybody.
    exclude: one gallery index a query that does not answer it, such as the
      query itself; −1 excludes nothing.
    block: gallery vectors scored at once, rounded up to a multiple of 128; a
      CPU that has many queries takes fewer.

  Returns:
    `Neighbours(scores, indices)`, float32 and int32. A query with fewer than k
    candidates has −∞ and −1 in the places that remain.

  Raises:
    ValueError: k or block below one, or shapes that do not fit together.
    TypeError: a mask that is not Boolean, an index that is not an integer.

  Example:
    >>> gallery = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    >>> found = exact_topk(gallery, gallery, 2, exclude=jnp.arange(3))
    >>> found.indices.tolist()
    [[2, 1], [0, 2], [0, 1]]
  """
  queries, gallery = jnp.asarray(queries), jnp.asarray(gallery)
  _check(queries, gallery, k, valid, exclude, block)
  if exclude is None:
    exclude = jnp.full(len(queries), -1)
  if valid is None:
    valid = jnp.ones(len(gallery), jnp.bool_)
  return _topk(
    queries,
    gallery,
    jnp.asarray(valid),
    jnp.asarray(exclude).astype(jnp.int32),
    k=k,
    block=min(-(-block // LANES), max(1, -(-len(gallery) // LANES))) * LANES,
  )


@functools.partial(jax.jit, static_argnames=('k', 'block'))
def _topk(
  queries: Float[Array, 'q d'],
  gallery: Float[Array, 'n d'],
  valid: Bool[Array, ' n'],
  exclude: Int[Array, ' q'],
  *,
  k: int,
  block: int,
) -> Neighbours:
  """`exact_topk`, the way that suits the processor."""
  count = len(queries)
  chunks = max(1, -(-count // CHUNK))
  rows = -(-count // (chunks * ROWS)) * ROWS
  queries = jnp.pad(queries, ((0, chunks * rows - count), (0, 0)))
  exclude = jnp.pad(exclude, (0, chunks * rows - count))
  if len(gallery) < block:
    missing = block - len(gallery)
    gallery = jnp.pad(gallery, ((0, missing), (0, 0)))
    valid = jnp.pad(valid, (0, missing))

  # What the loops carry must vary over the axes of a shard_map that any of
  # these vary over.
  arrays = varying_alike(queries, gallery, valid, exclude)

  def stream(queries, gallery, valid, exclude):
    tile = min(block, TILE)
    found = jax.lax.map(
      lambda asked: _stream(asked[0], gallery, valid, asked[1], k, tile),
      (
        queries.reshape(chunks, rows, -1),
        exclude.reshape(chunks, rows),
      ),
    )
    return jax.tree.map(lambda x: x.reshape(chunks * rows, k), found)

  def scan(queries, gallery, valid, exclude):
    return _scan(queries, gallery, valid, exclude, k, block)

  cpu = stream if k <= MAX_STREAM and count >= MIN_STREAM else scan
  found = jax.lax.platform_dependent(*arrays, cpu=cpu, default=scan)
  return jax.tree.map(lambda x: x[:count], found)


def _block(gallery: Array, valid: Array, block: int, start: Array):
  """A block: its first index, its vectors, and which of them may answer.

  The last one reaches back over vectors already seen instead of padding the
  gallery, which would copy it.
  """
  begin = jnp.minimum(start, len(gallery) - block)
  allowed = jax.lax.dynamic_slice_in_dim(valid, begin, block)
  allowed &= begin + jnp.arange(block, dtype=jnp.int32) >= start
  return begin, jax.lax.dynamic_slice_in_dim(gallery, begin, block), allowed


def _stream(
  queries: Float[Array, 'q d'],
  gallery: Float[Array, 'n d'],
  valid: Bool[Array, ' n'],
  exclude: Int[Array, ' q'],
  k: int,
  block: int,
) -> Neighbours:
  """Processors with caches: blocks are tiles that are poured out at once."""

  def step(best: Reservoir, start: Array) -> tuple[Reservoir, None]:
    begin, vectors, allowed = _block(gallery, valid, block, start)
    scores = inner_products(vectors, queries)
    best = pour(best, scores, begin, k=k, allowed=allowed, exclude=exclude)
    return best, None

  best = reservoir(k, len(queries))
  best = jax.tree.map(lambda x: varying_like(x, queries), best)
  starts = jnp.arange(0, len(gallery), block, dtype=jnp.int32)
  best, _ = jax.lax.scan(step, best, starts)
  return Neighbours(*drain(best, k))


def _scan(
  queries: Float[Array, 'q d'],
  gallery: Float[Array, 'n d'],
  valid: Bool[Array, ' n'],
  exclude: Int[Array, ' q'],
  k: int,
  block: int,
) -> Neighbours:
  """Accelerators: every block is sorted, and no step waits for a number."""

  def step(best: Neighbours, start: Array) -> tuple[Neighbours, None]:
    begin, vectors, allowed = _block(gallery, valid, block, start)
    columns = begin + jnp.arange(block, dtype=jnp.int32)
    scores = inner_products(queries, vectors)
    allowed = allowed[None, :] & (columns[None, :] != exclude[:, None])
    scores = comparable(scores, allowed)
    # top_k keeps the order of equal elements, and what is already best came
    # from lower indices.
    scores, places = jax.lax.top_k(scores, min(k, block))
    scores = jnp.concatenate([best.scores, scores], axis=1)
    indices = jnp.concatenate([best.indices, begin + places], axis=1)
    scores, places = jax.lax.top_k(scores, k)
    indices = jnp.take_along_axis(indices, places, axis=1)
    return Neighbours(scores, indices), None

  shape = (len(queries), k)
  best = Neighbours(
    jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32)
  )
  best = jax.tree.map(lambda x: varying_like(x, queries), best)
  starts = jnp.arange(0, len(gallery), block, dtype=jnp.int32)
  best, _ = jax.lax.scan(step, best, starts)
  return Neighbours(
    best.scores, jnp.where(best.scores > -jnp.inf, best.indices, -1)
  )


def _check(queries, gallery, k, valid, exclude, block):
  """Raises on the static facts that `exact_topk` depends on."""
  if k < 1 or block < 1:
    raise ValueError(f'{k=} and {block=} must be at least 1')
  if (
    queries.ndim != 2
    or gallery.ndim != 2
    or queries.shape[1] != gallery.shape[1]
  ):
    raise ValueError(
      f'queries (q, d) and gallery (n, d) do not fit: {queries.shape} and '
      f'{gallery.shape}'
    )
  if valid is not None:
    if valid.shape != gallery.shape[:1]:
      raise ValueError(
        f'{valid.shape=} must be one entry per gallery vector, '
        f'{gallery.shape[:1]}'
      )
    if valid.dtype != jnp.bool_:
      raise TypeError(f'{valid.dtype=} must be Boolean')
  if exclude is not None:
    if exclude.shape != queries.shape[:1]:
      raise ValueError(
        f'{exclude.shape=} must be one index per query, {queries.shape[:1]}'
      )
    if not jnp.issubdtype(exclude.dtype, jnp.integer):
      raise TypeError(f'{exclude.dtype=} must be an integer type')
