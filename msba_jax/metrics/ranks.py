r"""Ranks of the positives of every query, by counting what scores higher.

Every metric of retrieval follows from the ranks of a query's positives alone.
The rank of a positive p is

    1 + #{j : s_j > s_p} + #{j : s_j = s_p and j < p}

over the gallery without the query's ignored images: the order of `exact_topk`,
without sorting anything. A batch of queries holds its scores, batch × n, and
never the whole matrix.

Attributes:
  ABSENT: stands where a query has no further positive.
  positive_ranks: the ranks, ascending.
  query_block: how many queries to rank at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from msba_jax.layers.nearest import LANES, ROWS, inner_products

__all__ = [
  'ABSENT',
  'check_embeddings',
  'padded_gallery',
  'positive_ranks',
  'query_block',
]

ABSENT = np.iinfo(np.int32).max

# Scores that a batch of queries may hold, 64 MiB of float32.
SCORES = 2**24
# Slices of the gallery that one fused comparison counts over, and positives
# that it counts for: what is stored between is batch × POSITIVES × n / SLICES.
SLICES = 64
POSITIVES = 16


def query_block(queries: int, gallery: int, block: int | None = None) -> int:
  """How many queries to rank at once.

  Args:
    queries: how many there are.
    gallery: images that answer.
    block: an upper bound; None lets the scores of a batch take 64 MiB.

  Returns:
    A multiple of 8.

  Raises:
    ValueError: the block is below one.
  """
  if block is None:
    block = max(1, min(1024, SCORES // max(1, gallery)))
  if block < 1:
    raise ValueError(f'{block=} must be at least 1')
  return -(-min(block, max(1, queries)) // ROWS) * ROWS


def check_embeddings(
  queries: Float[np.ndarray, 'q d'], gallery: Float[np.ndarray, 'n d']
) -> None:
  """Raises ValueError on embeddings that cannot be ranked.

  Args:
    queries: vectors that ask.
    gallery: vectors that answer.

  Raises:
    ValueError: another rank or width, or numbers that are not finite.
  """
  for name, vectors in (('queries', queries), ('gallery', gallery)):
    if vectors.ndim != 2:
      raise ValueError(f'{name} must be (images, features): {vectors.shape}')
    if not np.isfinite(vectors).all():
      rows = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
      raise ValueError(
        f'{len(rows)} of {len(vectors)} {name} are not finite, the first is '
        f'{rows[0]}'
      )
  if queries.shape[1] != gallery.shape[1]:
    raise ValueError(
      f'queries and gallery have other widths: {queries.shape} and '
      f'{gallery.shape}'
    )


def padded_gallery(gallery: Float[np.ndarray, 'n d']) -> Float[Array, 'm d']:
  """The gallery on the device, its length a multiple that slices divide.

  Args:
    gallery: vectors that answer.

  Returns:
    The same with zero vectors behind it, which `positive_ranks` leaves out.
  """
  width = _slice_width(len(gallery))
  rows = max(1, -(-len(gallery) // width)) * width
  return jnp.pad(jnp.asarray(gallery), ((0, rows - len(gallery)), (0, 0)))


def positive_ranks(
  queries: Float[np.ndarray, 'q d'],
  gallery: Float[Array, 'm d'],
  positives: Int[np.ndarray, 'q p'],
  ignored: Int[np.ndarray, 'q j'],
  *,
  images: int,
) -> Int32[np.ndarray, 'q p']:
  """Ranks of the positives of a batch of queries, ascending, from 1.

  Args:
    queries: vectors that ask, all of which are ranked at once.
    gallery: from `padded_gallery`.
    positives: gallery indices; −1 is none.
    ignored: gallery indices that are taken out of the ranking; −1 is none. A
      positive among them loses its rank.
    images: length of the gallery before padding.

  Returns:
    Ranks in ascending order; `ABSENT` behind them where there are fewer.
  """
  rows = -(-len(queries) // ROWS) * ROWS - len(queries)
  ranks = _ranks(
    jnp.asarray(np.pad(queries, ((0, rows), (0, 0)))),
    gallery,
    _indices(positives, rows),
    _indices(ignored, rows),
    jnp.int32(images),
  )
  ranks = np.sort(np.asarray(ranks)[: len(queries)], axis=1)
  return ranks[:, : positives.shape[1]]


def _indices(indices: np.ndarray, rows: int) -> jax.Array:
  """Filled up to a power of two: few shapes, few compilations."""
  columns = (1 << max(0, indices.shape[1] - 1).bit_length()) - indices.shape[1]
  padding = ((0, rows), (0, columns))
  return jnp.asarray(
    np.pad(indices.astype(np.int32), padding, constant_values=-1)
  )


def _slice_width(images: int) -> int:
  return max(1, -(-images // (SLICES * LANES))) * LANES


@jax.jit
def _ranks(
  queries: Float[Array, 'q d'],
  gallery: Float[Array, 'm d'],
  positives: Int[Array, 'q p'],
  ignored: Int[Array, 'q j'],
  images: Int[Array, ''],
) -> Int[Array, 'q p']:
  """Unsorted ranks of a padded batch, `ABSENT` for what has none."""
  total = len(gallery)
  columns = jnp.arange(total, dtype=jnp.int32)
  scores = inner_products(queries, gallery)
  scores = jnp.where(columns[None, :] < images, scores, -jnp.inf)
  # Indices past the end are dropped, negative ones would count from the end.
  gone = jnp.where(ignored < 0, total, ignored)
  scores = jax.vmap(lambda row, j: row.at[j].set(-jnp.inf, mode='drop'))(
    scores, gone
  )
  chosen = jnp.take_along_axis(scores, jnp.maximum(positives, 0), axis=1)
  above = _count_above(scores, chosen, positives)
  present = (positives >= 0) & (chosen > -jnp.inf)
  return jnp.where(present, above + 1, ABSENT)


def _count_above(
  scores: Float[Array, 'q m'],
  chosen: Float[Array, 'q p'],
  positives: Int[Array, 'q p'],
) -> Int[Array, 'q p']:
  """How many columns come before each chosen one.

  The slices of the gallery are unrolled and not an axis to sum over: compilers
  fuse a chain of additions, where the comparison of every column with every
  positive would be stored before it is summed.
  """
  width = _slice_width(scores.shape[1])
  slices = [
    (start, jax.lax.slice_in_dim(scores, start, start + width, axis=1))
    for start in range(0, scores.shape[1], width)
  ]

  def count(arguments: tuple[Array, Array]) -> Array:
    """For (q, some) scores and indices."""
    score, index = (x[:, :, None] for x in arguments)
    columns = jnp.arange(width, dtype=jnp.int32)[None, None, :]
    before = [
      (part[:, None, :] > score)
      | ((part[:, None, :] == score) & (columns + start < index))
      for start, part in slices
    ]
    total = functools.reduce(jnp.add, [x.astype(jnp.int32) for x in before])
    return total.sum(axis=-1)

  some = min(POSITIVES, chosen.shape[1])
  shape = (len(chosen), -1, some)
  parts = tuple(
    x.reshape(shape).transpose(1, 0, 2) for x in (chosen, positives)
  )
  counts = jax.lax.map(count, parts)
  return counts.transpose(1, 0, 2).reshape(chosen.shape)
