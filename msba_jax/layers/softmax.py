r"""Softmax over keys, in which a row without keys gives zeros and not NaN.

Attributes:
  softmax_attended: from queries, keys and values to messages.
  softmax_or_zero: from scores to weights.
  shifted_exponentials: what both are made of.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msba_jax.layers.online import Attended

__all__ = [
  'shifted_exponentials',
  'softmax_attended',
  'softmax_or_zero',
]


def softmax_attended(
  queries: Float[Array, '*b n d'],
  keys: Float[Array, '*b m d'],
  values: Float[Array, '*b m f'],
  *,
  scale: float,
  mask: Bool[Array, '...'] | None = None,
  bias: Float[Array, '...'] | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Attended:
  r"""Messages of one head a slice, and log-normalisers.

  XLA makes one kernel of it on CPU if the normalisers are not used. Rows are
  divided by their sums after the second product, and nothing selects between a
  row with keys and one without: the peak of an empty row is the smallest number
  there is, and its sum is held above zero.

  Args:
    queries: what asks.
    keys: what answers.
    values: what is read.
    scale: factor of the products.
    mask: broadcasts to (*b, n, m); True takes part.
    bias: broadcasts to (*b, n, m).
    precision: of both matrix products.

  Returns:
    Messages in the dtype of the values, and normalisers in float32; 0 and −∞
    where nothing takes part.
  """
  product = functools.partial(
    jnp.einsum, precision=precision, preferred_element_type=jnp.float32
  )
  scores = product('...nd,...md->...nm', queries, keys) * scale
  if bias is not None:
    scores = scores + jnp.broadcast_to(bias, scores.shape).astype(jnp.float32)
  if mask is not None:
    scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, -jnp.inf)
  peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  peak = jnp.maximum(peak, jnp.finfo(jnp.float32).min)
  raised = jnp.exp(scores - peak)
  # A row with a key has one exponential that is one.
  total = jnp.sum(raised, axis=-1, keepdims=True)
  held = jnp.maximum(total, 0.5)
  read = product('...nm,...mf->...nf', raised.astype(values.dtype), values)
  normalizer = jnp.where(total > 0, jnp.log(held) + peak, -jnp.inf)
  return Attended(
    (read / held).astype(values.dtype), jnp.squeeze(normalizer, axis=-1)
  )


def softmax_or_zero(
  scores: Float[Array, '*b h n m'],
) -> Float[Array, '*b h n m']:
  r"""Softmax over the last axis; a row of −∞ gives zeros, not NaN.

  Args:
    scores: as `attention_scores` gives them; −∞ does not take part.

  Returns:
    Weights; rows sum to one, or to zero where nothing takes part.
  """
  if scores.shape[-1] == 0:
    return scores
  _, exponentials = shifted_exponentials(scores)
  total = jnp.sum(exponentials, axis=-1, keepdims=True)
  return exponentials / jnp.where(total > 0, total, 1)


def shifted_exponentials(scores: Array) -> tuple[Array, Array]:
  """Row maxima (0 for an empty row) and exp(scores − maximum)."""
  peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  peak = jnp.where(peak == -jnp.inf, 0, peak)
  return peak, jnp.exp(scores - peak)
