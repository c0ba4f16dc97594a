r"""Exact nearest neighbours by inner product, a block of the gallery at a time.

The best k of every query so far travel through a scan over blocks of the
gallery, so memory is q · (block + k) scores and never q · n. Nothing is
approximate: products accumulate in float32 at the highest precision, and among
equal scores the lower index comes first.

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

__all__ = ['LANES', 'ROWS', 'Neighbours', 'exact_topk', 'inner_products']

# Matrix products treat the columns and rows that do not fill a register
# differently, and an image that stands twice in a gallery would score an ulp
# more at one place than at the other. Whole multiples of these two sizes give
# every pair the same arithmetic wherever it stands.
LANES = 128
ROWS = 8


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
    block: gallery vectors scored at once, rounded up to a multiple of 128.

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
  count = len(queries)
  if exclude is None:
    exclude = jnp.full(count, -1)
  if valid is None:
    valid = jnp.ones(len(gallery), jnp.bool_)
  rows = -(-count // ROWS) * ROWS - count
  found = _scan(
    jnp.pad(queries, ((0, rows), (0, 0))),
    gallery,
    jnp.asarray(valid),
    jnp.pad(jnp.asarray(exclude).astype(jnp.int32), (0, rows)),
    k=k,
    block=min(-(-block // LANES), max(1, -(-len(gallery) // LANES))) * LANES,
  )
  return Neighbours(found.scores[:count], found.indices[:count])


@functools.partial(jax.jit, static_argnames=('k', 'block'))
def _scan(
  queries: Float[Array, 'q d'],
  gallery: Float[Array, 'n d'],
  valid: Bool[Array, ' n'],
  exclude: Int[Array, ' q'],
  *,
  k: int,
  block: int,
) -> Neighbours:
  """The scan of `exact_topk` over starts of blocks."""
  total = len(gallery)
  if total < block:
    gallery = jnp.pad(gallery, ((0, block - total), (0, 0)))
    valid = jnp.pad(valid, (0, block - total))

  def step(best: Neighbours, start: Array) -> tuple[Neighbours, None]:
    # The last block reaches back over images already seen instead of padding
    # the gallery, which would copy it.
    begin = jnp.minimum(start, len(gallery) - block)
    columns = begin + jnp.arange(block, dtype=jnp.int32)
    scores = inner_products(
      queries, jax.lax.dynamic_slice_in_dim(gallery, begin, block)
    )
    allowed = jax.lax.dynamic_slice_in_dim(valid, begin, block)
    allowed &= columns >= start
    allowed = allowed[None, :] & (columns[None, :] != exclude[:, None])
    scores = jnp.where(allowed & (scores > -jnp.inf), scores, -jnp.inf)
    # Sorting puts −0 below +0, which would break a tie by something else.
    scores = jnp.where(scores == 0, jnp.abs(scores), scores)
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
  # Inside shard_map what travels must vary over the axes that the inputs vary
  # over, and a constant does so only after it has met them.
  met = jnp.any(valid[:1]) | jnp.any(exclude[:1] < 0)
  met |= jnp.any(jnp.isnan(queries[:1])) | jnp.any(jnp.isnan(gallery[:1]))
  best = jax.tree.map(lambda x: jnp.where(met, x, x), best)
  starts = jnp.arange(0, total, block, dtype=jnp.int32)
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
