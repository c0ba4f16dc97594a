r"""The number of a given rank in every row, without sorting.

Float32 scores become unsigned integers of the same order, and the largest
integer that enough of a row reach is found bit by bit. That is 32 counts over a
row where a sort compares and moves, and the rank is data.

Attributes:
  allowed_keys: which entries of a row may be selected.
  own_keys: which entry is the row itself.
  counts_of_rows: a count for every row.
  candidates_of: scores in the order of selection.
  ordered_bits: integers of the same order.
  of_rank: the integer of a given rank.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from msba_jax.layers.varying import varying_like

__all__ = [
  'allowed_keys',
  'candidates_of',
  'counts_of_rows',
  'of_rank',
  'ordered_bits',
  'own_keys',
]


def allowed_keys(scores: Array, mask: Array | None) -> Array:
  """What may stay: neither −∞ nor NaN, and True in the mask."""
  if mask is None:
    return scores > -jnp.inf
  if mask.dtype != jnp.bool_:
    raise TypeError(f'mask must be Boolean, True takes part: {mask.dtype=}')
  return (scores > -jnp.inf) & jnp.broadcast_to(mask, scores.shape)


def own_keys(own: Array | None, scores: Array) -> Array:
  """True where the column is the row itself."""
  if own is None:
    return jnp.zeros(scores.shape, jnp.bool_)
  if own.shape != scores.shape[-2:-1]:
    raise ValueError(f'own must be one per row: {own.shape=} {scores.shape=}')
  if not jnp.issubdtype(own.dtype, jnp.integer):
    raise TypeError(f'{own.dtype=} must be an integer type')
  columns = jnp.arange(scores.shape[-1], dtype=own.dtype)
  return jnp.broadcast_to(own[:, None] == columns[None], scores.shape)


def counts_of_rows(keep: Array | int, scores: Array) -> Array:
  """`keep` of every row, int32."""
  m = scores.shape[-1]
  if isinstance(keep, int) and not 1 <= keep <= m:
    raise ValueError(f'{keep=} must be between 1 and the {m} keys')
  keep = jnp.asarray(keep)
  if not jnp.issubdtype(keep.dtype, jnp.integer):
    raise TypeError(f'{keep.dtype=} must be an integer type')
  return jnp.broadcast_to(keep.astype(jnp.int32), scores.shape[:-1])


def candidates_of(
  scores: Array, own: Array | None, mask: Array | None
) -> Array:
  """Float32 scores: +∞ for the row itself, −∞ for what may not stay."""
  finite = jnp.finfo(jnp.float32)
  rows = jax.lax.stop_gradient(scores).astype(jnp.float32)
  rows = jnp.clip(rows, finite.min, finite.max)
  rows = jnp.where(rows == 0, 0, rows)  # −0 is no less than 0
  rows = jnp.where(own_keys(own, scores), jnp.inf, rows)
  return jnp.where(allowed_keys(scores, mask), rows, -jnp.inf)


def ordered_bits(candidates: Array) -> Array:
  """Unsigned integers in the order of the candidates; zero for −∞."""
  sign = jnp.uint32(1 << 31)
  bits = jax.lax.bitcast_convert_type(candidates, jnp.uint32)
  bits = jnp.where(bits >= sign, ~bits, bits | sign)
  return jnp.where(candidates > -jnp.inf, bits, 0)


def of_rank(ordered: Array, rank: Array, *, bits: int = 32) -> Array:
  """The number of that rank in each row, zero where there are fewer.

  Numbers are unsigned and of so many bits; rank one is the largest.
  """

  def step(i: Array, found: Array) -> Array:
    more = found | (jnp.uint32(1 << (bits - 1)) >> i.astype(jnp.uint32))
    enough = jnp.sum(ordered >= more[..., None], axis=-1, dtype=jnp.int32)
    return jnp.where(enough >= rank, more, found)

  found = varying_like(jnp.zeros(rank.shape, jnp.uint32), ordered, rank)
  return jax.lax.fori_loop(0, bits, step, found)
