r"""Which keys of a row stay: counts, masks, indices and their gradients.

A mask by itself saves no time. It serves training, where the choice is learned;
`msba_jax.layers.sparse` computes only what the same choice keeps. Everywhere a
score of −∞ or NaN is never kept, and neither is what a mask leaves out.

Attributes:
  row_statistics: what a network that sets the sparsity reads of a row.
  keep_counts: how many keys a ratio is.
  topk_mask: the largest scores of every row.
  topk_indices: the same as indices, best first.
  relative_mask: the weights that are not small beside the largest.
  soft_keep: a smooth mask that learns from the scores and from the count.
  sparse_weights: rows of weights without what is not kept.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from msba_jax.layers.interventions import renormalized
from msba_jax.layers.selection import (
  allowed_keys,
  candidates_of,
  counts_of_rows,
  of_rank,
  ordered_bits,
  own_keys,
)

__all__ = [
  'keep_counts',
  'relative_mask',
  'row_statistics',
  'soft_keep',
  'sparse_weights',
  'topk_indices',
  'topk_mask',
]

# Rows that keep less than this share are not blown up to sum to one.
LEAST = 1e-6


def row_statistics(
  logits: Float[Array, '*b n m'], *, mask: Bool[Array, '...'] | None = None
) -> Float[Array, '*b n 3']:
  r"""Entropy over log m, maximum and standard deviation of every row.

  Gradients are finite everywhere: that of the deviation of a row whose logits
  are all equal is zero.

  Args:
    logits: scores before the softmax; −∞ does not take part.
    mask: broadcasts to the logits; True takes part, and m is their number.

  Returns:
    Three numbers a row. The entropy is that of the softmax and lies between
    zero and one, zero where one key takes part; zeros where none does.

  Raises:
    TypeError: the mask is not Boolean.

  Example:
    >>> row_statistics(jnp.array([[1.0, 1.0], [3.0, -jnp.inf]])).tolist()
    [[1.0, 1.0, 0.0], [0.0, 3.0, 0.0]]
  """
  valid = allowed_keys(logits, mask)
  rows = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  count = jnp.sum(valid, axis=-1, keepdims=True, dtype=rows.dtype)
  peak = jnp.max(jnp.where(valid, rows, -jnp.inf), axis=-1, keepdims=True)
  peak = jnp.where(count > 0, peak, 0)
  rows = jnp.where(valid, rows - jax.lax.stop_gradient(peak), 0)
  exponentials = jnp.where(valid, jnp.exp(rows), 0)
  total = jnp.sum(exponentials, axis=-1, keepdims=True)
  total = jnp.where(count > 0, total, 1)
  entropy = jnp.log(total) - jnp.sum(
    exponentials / total * rows, axis=-1, keepdims=True
  )
  found = (
    entropy / jnp.log(jnp.maximum(count, 2)),
    peak,
    _deviation(rows, valid, count),
  )
  return jnp.concatenate(found, axis=-1).astype(logits.dtype)


def keep_counts(
  ratios: Float[Array, '*b'] | float, count: Int[Array, '...'] | int
) -> Int32[Array, '...']:
  r"""⌈ρ · count⌉, at least one and at most all.

  What a ratio exceeds a whole number by in rounding does not count: a third of
  three is one.

  Args:
    ratios: ρ, between zero and one.
    count: how many there are; broadcasts against the ratios.

  Returns:
    int32.

  Example:
    >>> keep_counts(jnp.array([0.25, 1 / 3, 0.01, 1.0]), 8).tolist()
    [2, 3, 1, 8]
  """
  ratios = jnp.asarray(ratios)
  ratios, count = jnp.broadcast_arrays(ratios, jnp.asarray(count))
  rounding = 2 * float(jnp.finfo(ratios.dtype).eps)
  exact = ratios.astype(jnp.float32) * count.astype(jnp.float32)
  kept = jnp.ceil(exact * (1 - rounding)).astype(jnp.int32)
  return jnp.clip(kept, 1, jnp.maximum(count.astype(jnp.int32), 1))


def topk_mask(
  scores: Float[Array, '*b n m'],
  keep: Int[Array, '...'] | int,
  *,
  own: Int[Array, ' n'] | None = None,
  mask: Bool[Array, '...'] | None = None,
) -> Bool[Array, '*b n m']:
  r"""True for the `keep` largest of every row; ties go to the lower index.

  The score of rank `keep` is found by bisection over the bits of a float32, 32
  counts a row, which is faster than sorting and takes a `keep` that is data.

  Args:
    scores: compared in float32.
    keep: how many stay: a number, or an array that broadcasts to (*b, n).
    own: the key that is the row itself, which stays before all others; −1 where
      there is none.
    mask: broadcasts to the scores; True may stay.

  Returns:
    The mask; a row with fewer than `keep` keys keeps them all.

  Raises:
    ValueError: a number `keep` is not between 1 and m, or `own` is not one per
      row.
    TypeError: `keep` or `own` is not an integer, or the mask not Boolean.

  Example:
    >>> scores = jnp.array([[0.3, 0.1, 0.3], [0.2, 0.5, 0.4]])
    >>> topk_mask(scores, jnp.array([1, 2]), own=jnp.array([1, 2])).tolist()
    [[False, True, False], [False, True, True]]
  """
  keep = counts_of_rows(keep, scores)
  ordered = ordered_bits(candidates_of(scores, own, mask))
  least = of_rank(ordered, keep)[..., None]
  above, tied = ordered > least, (ordered == least) & (ordered > 0)
  room = keep - jnp.sum(above, axis=-1, dtype=jnp.int32)
  # The first of those that are equal: the largest of what counts down.
  m = scores.shape[-1]
  column = jax.lax.broadcasted_iota(jnp.uint32, tied.shape, tied.ndim - 1)
  place = jnp.where(tied, m - column, 0)
  last = of_rank(place, room, bits=m.bit_length())[..., None]
  return above | (tied & (place >= last))


def topk_indices(
  scores: Float[Array, '*b n m'],
  keep: Int[Array, '...'] | int,
  *,
  most: int | None = None,
  own: Int[Array, ' n'] | None = None,
  mask: Bool[Array, '...'] | None = None,
) -> Int32[Array, '*b n k']:
  """What `topk_mask` keeps, as `attend_blocks` takes it.

  Args:
    scores: compared in float32.
    keep: how many stay: a number, or an array that broadcasts to (*b, n).
    most: how many indices a row has room for, whatever its `keep`. None: `keep`
      if that is a number, m if it is an array.
    own: the key that is the row itself, which comes first; −1 for none.
    mask: broadcasts to the scores; True may stay.

  Returns:
    Indices, best first; −1 beyond those that stay.

  Raises:
    ValueError: `most` or a number `keep` is not between 1 and m, a number
      `keep` is more than `most`, or `own` is not one per row.
    TypeError: `keep` or `own` is not an integer, or the mask not Boolean.

  Example:
    >>> scores = jnp.array([[0.3, 0.1, 0.3], [0.2, 0.5, 0.4]])
    >>> topk_indices(scores, jnp.array([1, 2]), most=2).tolist()
    [[0, -1], [1, 2]]
  """
  m = scores.shape[-1]
  if most is None:
    most = keep if isinstance(keep, int) else m
  if isinstance(keep, int) and keep > most:
    raise ValueError(f'{keep=} must not be more than {most=}')
  if not 1 <= most <= m:
    raise ValueError(f'{most=} must be between 1 and the {m} keys')
  keep = counts_of_rows(keep, scores)
  best, indices = jax.lax.top_k(candidates_of(scores, own, mask), most)
  rank = jax.lax.broadcasted_iota(jnp.int32, best.shape, best.ndim - 1)
  return jnp.where((best > -jnp.inf) & (rank < keep[..., None]), indices, -1)


def relative_mask(
  weights: Float[Array, '*b n m'],
  thresholds: Float[Array, '...'] | float,
  *,
  own: Int[Array, ' n'] | None = None,
  mask: Bool[Array, '...'] | None = None,
) -> Bool[Array, '*b n m']:
  r"""A_ij ≥ τ_i max_j A_ij: what is not small beside the largest of its row.

  Args:
    weights: A, not negative.
    thresholds: τ between zero and one, broadcasts to (*b, n); with zero all
      keys of positive weight stay, with one only the largest.
    own: the key that is the row itself, which stays; −1 for none.
    mask: broadcasts to the weights; True may stay.

  Returns:
    The mask. A weight of zero stays only where it is the row's own.

  Raises:
    ValueError: `own` is not one per row.
    TypeError: `own` is not an integer, or the mask not Boolean.

  Example:
    >>> relative_mask(jnp.array([[0.6, 0.3, 0.1]]), 0.5).tolist()
    [[True, True, False]]
  """
  allowed = allowed_keys(weights, mask)
  rows = jnp.where(allowed, jax.lax.stop_gradient(weights), 0)
  shares = jnp.broadcast_to(jnp.asarray(thresholds), weights.shape[:-1])
  least = shares[..., None] * jnp.max(rows, axis=-1, keepdims=True)
  return ((rows > 0) & (rows >= least)) | (own_keys(own, weights) & allowed)


def soft_keep(
  scores: Float[Array, '*b n m'],
  keep: Float[Array, '...'] | float,
  temperature: Float[Array, ''] | float,
  *,
  own: Int[Array, ' n'] | None = None,
  mask: Bool[Array, '...'] | None = None,
) -> Float[Array, '*b n m']:
  r"""M_j = σ((s_j − θ) / T), θ the score of rank keep + ½.

  Between two ranks θ is interpolated, s_(r) + (keep + ½ − r) (s_(r+1) − s_(r)),
  and one rank before the first and behind the last it goes on by 2T, so that
  it has a gradient to both scores and to `keep`. For a whole number exactly
  the `keep` largest lie above one half: the gradient that belongs to
  `topk_mask`, whose own has none. Where T is large beside the distances of
  neighbouring scores, Σ_j M_j grows by one as `keep` does; where T is small, no
  score but the two around θ learns.

  Args:
    scores: s.
    keep: a real number of keys, broadcasts to (*b, n).
    temperature: T, in the unit of the scores.
    own: the key that is the row itself, of rank one: it is 1, without gradient;
      −1 for none.
    mask: broadcasts to the scores; True may stay, others are 0.

  Returns:
    Between zero and one, in the dtype of the scores.

  Raises:
    ValueError: the temperature is a number that is not positive, or `own` is
      not one per row.
    TypeError: `own` is not an integer, or the mask not Boolean.

  Example:
    >>> soft = soft_keep(jnp.array([[0.0, 2.0, 4.0]]), 1.5, 1.0)
    >>> [round(x, 4) for x in soft[0].tolist()]
    [0.1192, 0.5, 0.8808]
  """
  if isinstance(temperature, float | int) and not temperature > 0:
    raise ValueError(f'{temperature=} must be positive')
  candidates = candidates_of(scores, own, mask)
  itself = candidates == jnp.inf
  ordered = ordered_bits(jnp.where(itself, -jnp.inf, candidates))
  ranked = ordered > 0
  rows = jnp.where(ranked, scores.astype(jnp.float32), 0)
  count = jnp.sum(ranked, axis=-1, dtype=jnp.int32)
  place = jnp.broadcast_to(jnp.asarray(keep, jnp.float32), count.shape) + 0.5
  place = place - jnp.any(itself, axis=-1).astype(jnp.float32)
  place = jnp.clip(place, 0, (count + 1).astype(jnp.float32))
  rank = jnp.minimum(jnp.floor(place).astype(jnp.int32), count)
  share = (place - rank)[..., None]

  def score_of(rank: Array) -> Array:
    inside = jnp.clip(rank, 1, jnp.maximum(count, 1))
    least = of_rank(ordered, inside)[..., None]
    index = jnp.argmax(ordered == least, axis=-1, keepdims=True)
    beyond = (inside - rank)[..., None].astype(jnp.float32)
    found = jnp.take_along_axis(rows, index, axis=-1)
    return found + 2 * temperature * beyond

  level = (1 - share) * score_of(rank) + share * score_of(rank + 1)
  soft = jnp.where(ranked, jax.nn.sigmoid((rows - level) / temperature), 0)
  return jnp.where(itself, 1, soft).astype(scores.dtype)


def sparse_weights(
  weights: Float[Array, '*b n m'],
  kept: Float[Array, '*#b n m'] | Bool[Array, '*#b n m'],
) -> Float[Array, '*b n m']:
  r"""A_ij M_ij / Σ_j A_ij M_ij, in float32 at least inside.

  Args:
    weights: A.
    kept: M, Boolean, or numbers that have a gradient.

  Returns:
    Rows that sum to one, in the dtype of the weights; to less where the kept
    share is below a millionth, and to zero where nothing is kept.

  Example:
    >>> weights = jnp.array([[0.5, 0.25, 0.25]])
    >>> sparse_weights(weights, jnp.array([[False, True, True]])).tolist()
    [[0.0, 0.5, 0.5]]
  """
  rows = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
  rows = rows * jnp.broadcast_to(kept, rows.shape).astype(rows.dtype)
  return renormalized(rows, least=LEAST).astype(weights.dtype)


def _deviation(rows: Array, valid: Array, count: Array) -> Array:
  """Standard deviations (…, 1) of the valid numbers of rows."""
  mean = jnp.sum(rows, axis=-1, keepdims=True) / jnp.maximum(count, 1)
  away = jnp.where(valid, rows - mean, 0)
  size = jax.lax.stop_gradient(jnp.max(jnp.abs(away), axis=-1, keepdims=True))
  spread = size > 0
  # Squares of large numbers overflow, the root of zero has no gradient.
  away = away / jnp.where(spread, size, 1)
  squares = jnp.sum(away**2, axis=-1, keepdims=True) / jnp.maximum(count, 1)
  return jnp.where(spread, size * jnp.sqrt(jnp.where(spread, squares, 1)), 0)
