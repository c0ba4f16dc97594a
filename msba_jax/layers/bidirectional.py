r"""Attention between images in both directions.

Messages travel in both directions: what an image reads from the others, and
what the others would send to it.

Attributes:
  BidirectionalWeights: the weights of both directions.
  Messages: the forward and the backward message.
  bidirectional_weights: who is read, and who would send.
  bidirectional_messages: what is read, and what would be sent.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msba_jax.layers.attention import (
  attention_scores,
  log_normalizer,
  weighted_sum,
)
from msba_jax.layers.softmax import softmax_or_zero

__all__ = [
  'BidirectionalWeights',
  'Messages',
  'bidirectional_messages',
  'bidirectional_weights',
]


class BidirectionalWeights(NamedTuple):
  """What `bidirectional_weights` returns, float32.

  Attributes:
    forward: A, (r, h, n, m), how much n reads of m.
    backward: B, (r, h, n, m), how much m would send to n.
  """

  forward: Array
  backward: Array


class Messages(NamedTuple):
  """What `bidirectional_messages` returns.

  Attributes:
    forward: (n, r, h, f), what n reads from its context.
    backward: (n, r, h, f), what its context would send to n.
    weights: (r, h, n, m), the weights A of the forward message, float32.
  """

  forward: Array
  backward: Array
  weights: Array


def bidirectional_weights(
  queries: Float[Array, 'n r h d'],
  keys: Float[Array, 'm r h d'],
  *,
  mask: Bool[Array, '#n #m'] | None = None,
  bias: Float[Array, '*#b #n #m'] | None = None,
  asking_keys: Float[Array, 'n r h d'] | None = None,
  foreign_queries: Float[Array, 'j r h d'] | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> BidirectionalWeights:
  r"""How much n reads of its context, and how much its context would send to n.

  For every region and head,

      A[n,m] = softmax_m(q[n]·k[m]/√d + bias[n,m])
      B[n,m] = softmax_m(k[n]·q[m]/√d + bias[m,n] − lse[m])

  with lse[m] the log-normaliser of m's own row, so that B is A transposed with
  its rows renormalised. The mask of A is the mask of B as well: an image that n
  may not look at sends nothing to n.

  The context is the asking images themselves (m = n), or foreign images that
  do not ask, as those of a memory or of neighbours (m = j), or both, the asking
  images first (m = n + j). A foreign image has queries, given in
  `foreign_queries`, and its lse is 0 and its bias stands at [n, m].

  Args:
    queries: regions of the asking images.
    keys: regions of the context.
    mask: True where n may look at m; broadcasts.
    bias: added to the scores; broadcasts to (r, h, n, m).
    asking_keys: keys of the asking images; needed only where the context is
      foreign alone, else they are the first n of `keys`.
    foreign_queries: queries of the foreign images, the last j of the context.
    precision: of the matrix products, as in `jax.lax.dot_general`.

  Returns:
    The weights of both directions. A row that may look at nobody is zero.

  Raises:
    ValueError: the context is neither the asking images, nor the foreign ones,
      nor both; or asking keys are missing.
    TypeError: the mask is not Boolean.
  """
  n, m = queries.shape[0], keys.shape[0]
  foreign = 0 if foreign_queries is None else foreign_queries.shape[0]
  if m not in (foreign, n + foreign):
    raise ValueError(
      f'a context of {m} images is neither the {foreign} foreign ones nor '
      f'these after the {n} asking ones'
    )
  if foreign and asking_keys is None and m == foreign:
    raise ValueError('a context of foreign images alone needs asking_keys')
  askers = m - foreign
  if asking_keys is None:
    asking_keys = keys[:n]
  context_queries = queries[:askers]
  if foreign_queries is not None:
    context_queries = jnp.concatenate([context_queries, foreign_queries])

  q, k, k_asking, q_context = (
    jnp.swapaxes(x, 0, 1) for x in (queries, keys, asking_keys, context_queries)
  )
  scores = attention_scores(q, k, mask=mask, bias=bias, precision=precision)
  back_scores = attention_scores(
    k_asking,
    q_context,
    mask=mask,
    bias=_backward_bias(log_normalizer(scores), bias, askers, n, m),
    precision=precision,
  )
  return BidirectionalWeights(
    softmax_or_zero(scores), softmax_or_zero(back_scores)
  )


def bidirectional_messages(
  queries: Float[Array, 'n r h d'],
  keys: Float[Array, 'm r h d'],
  values: Float[Array, 'm r h f'],
  backward_values: Float[Array, 'm r h f'],
  *,
  mask: Bool[Array, '#n #m'] | None = None,
  bias: Float[Array, '*#b #n #m'] | None = None,
  asking_keys: Float[Array, 'n r h d'] | None = None,
  foreign_queries: Float[Array, 'j r h d'] | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Messages:
  r"""What n reads from its context, and what its context would send to n.

  For every region and head, with A and B of `bidirectional_weights`,

      forward = Σ_m A[n,m] v[m],    backward = Σ_m B[n,m] v'[m]

  Args:
    queries: regions of the asking images.
    keys: regions of the context.
    values: what is read from the context.
    backward_values: what the context sends.
    mask: as in `bidirectional_weights`, and so are the others.
    bias: likewise.
    asking_keys: likewise.
    foreign_queries: likewise.
    precision: of the matrix products, as in `jax.lax.dot_general`.

  Returns:
    Both messages in the dtype of the values, and the weights A. A row that may
    look at nobody is zero.

  Raises:
    ValueError: as `bidirectional_weights` does.
    TypeError: the mask is not Boolean.
  """
  weights = bidirectional_weights(
    queries,
    keys,
    mask=mask,
    bias=bias,
    asking_keys=asking_keys,
    foreign_queries=foreign_queries,
    precision=precision,
  )
  forward, backward = (
    jnp.swapaxes(
      weighted_sum(direction, jnp.swapaxes(read, 0, 1), precision=precision),
      0,
      1,
    )
    for direction, read in zip(weights, (values, backward_values), strict=True)
  )
  return Messages(forward, backward, weights.forward)


def _backward_bias(
  lse: Array, bias: Array | None, askers: int, n: int, m: int
) -> Array:
  """bias[m,n] − lse[m] for those who ask, bias[n,m] for the foreign."""
  # An image that looks at nobody has an empty column in A: it sends nothing.
  column = jnp.where(lse == -jnp.inf, -jnp.inf, -lse)[..., :askers]
  column = jnp.pad(column, [(0, 0)] * (lse.ndim - 1) + [(0, m - askers)])
  column = jnp.broadcast_to(column[..., None, :], (*column.shape[:-1], n, m))
  if bias is None:
    return column
  bias = jnp.broadcast_to(bias, (*bias.shape[:-2], n, m))
  if askers:
    turned = jnp.swapaxes(bias[..., :n], -1, -2)
    bias = jnp.concatenate([turned, bias[..., n:]], axis=-1)
  return column + jnp.broadcast_to(bias, column.shape)
