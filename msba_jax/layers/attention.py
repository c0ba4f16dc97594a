r"""Dense attention whose masked rows are zero and whose sums are float32.

Scores and softmax are computed in float32 whatever the inputs are; the result
returns to the dtype of the values. A mask is Boolean and True takes part; a
bias is added to the scaled scores. A row that may look at nothing gives exact
zeros, forward and backward, where `jax.nn.dot_product_attention` gives the mean
of the values.

Attributes:
  attention_scores: scaled, biased and masked scores, float32.
  log_normalizer: log of the sum of exponentials of every row.
  attention_weights: the softmax of the scores.
  attend: the weighted sum of the values.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msba_jax.layers.chunked import attend_in_chunks
from msba_jax.layers.implementations import (
  Implementation,
  cudnn_attention,
  resolve_implementation,
  splash_attention,
)
from msba_jax.layers.softmax import (
  shifted_exponentials,
  softmax_attended,
  softmax_or_zero,
)

__all__ = [
  'attend',
  'attention_scores',
  'attention_weights',
  'log_normalizer',
]

# Scores of one head from which heads that come first pay for being moved.
FUSED_SCORES = 32 * 32


def attention_scores(
  queries: Float[Array, '*b n h d'],
  keys: Float[Array, '*b m h d'],
  *,
  mask: Bool[Array, '...'] | None = None,
  bias: Float[Array, '...'] | None = None,
  scale: float | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, '*b h n m']:
  r"""Scores of every (query, key) pair: scale · q·k + bias, or −∞ if masked.

  Args:
    queries: what asks.
    keys: what answers.
    mask: broadcasts to `(*b, h, n, m)`; True takes part. None: all do.
    bias: broadcasts to `(*b, h, n, m)`; added after the scaling.
    scale: factor of the products; None is 1/√d.
    precision: of the matrix product, as in `jax.lax.dot_general`.

  Returns:
    Scores in float32, minus infinity where masked.

  Raises:
    ValueError: the shapes do not fit together.
    TypeError: the mask is not Boolean.
  """
  _check(queries, keys, mask, bias)
  if scale is None:
    scale = 1 / math.sqrt(queries.shape[-1])
  scores = jnp.einsum(
    '...nhd,...mhd->...hnm',
    queries,
    keys,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  scores = scores * scale
  if bias is not None:
    scores = scores + jnp.broadcast_to(bias, scores.shape).astype(jnp.float32)
  if mask is not None:
    scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, -jnp.inf)
  return scores


def log_normalizer(
  scores: Float[Array, '*b h n m'],
) -> Float[Array, '*b h n']:
  r"""Log-sum-exp of every row: lse = log Σ_m exp(scores_m).

  Args:
    scores: as `attention_scores` gives them; −∞ does not take part.

  Returns:
    One float32 number a row; −∞ for a row in which nothing takes part, with a
    zero gradient.
  """
  if scores.shape[-1] == 0:
    return jnp.full(scores.shape[:-1], -jnp.inf, scores.dtype)
  peak, exponentials = shifted_exponentials(scores)
  total = jnp.sum(exponentials, axis=-1)
  alive = total > 0
  return jnp.where(
    alive,
    jnp.log(jnp.where(alive, total, 1)) + jnp.squeeze(peak, axis=-1),
    -jnp.inf,
  )


def attention_weights(
  queries: Float[Array, '*b n h d'],
  keys: Float[Array, '*b m h d'],
  *,
  mask: Bool[Array, '...'] | None = None,
  bias: Float[Array, '...'] | None = None,
  scale: float | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, '*b h n m']:
  r"""Weights of attention: A = softmax_m(scale · q·k + bias).

  Args:
    queries: what asks.
    keys: what answers.
    mask: broadcasts to `(*b, h, n, m)`; True takes part. None: all do.
    bias: broadcasts to `(*b, h, n, m)`; added after the scaling.
    scale: factor of the products; None is 1/√d.
    precision: of the matrix product, as in `jax.lax.dot_general`.

  Returns:
    Weights in float32. A row sums to one, or to exactly zero when nothing in it
    takes part.

  Raises:
    ValueError: the shapes do not fit together.
    TypeError: the mask is not Boolean.

  Example:
    >>> queries, keys = jnp.ones((2, 1, 4)), jnp.ones((3, 1, 4))
    >>> mask = jnp.array([[True, True, False], [False, False, False]])
    >>> attention_weights(queries, keys, mask=mask)[0].tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
  """
  return softmax_or_zero(
    attention_scores(
      queries, keys, mask=mask, bias=bias, scale=scale, precision=precision
    )
  )


def attend(
  queries: Float[Array, '*b n h d'],
  keys: Float[Array, '*b m h d'],
  values: Float[Array, '*b m h f'],
  *,
  mask: Bool[Array, '...'] | None = None,
  bias: Float[Array, '...'] | None = None,
  scale: float | None = None,
  precision: jax.lax.PrecisionLike = None,
  implementation: Implementation | None = None,
  chunk: int | tuple[int, int] | None = None,
) -> Float[Array, '*b n h f']:
  r"""Scaled dot-product attention: o = softmax_m(scale · q·k + bias) v.

  Args:
    queries: what asks.
    keys: what answers.
    values: what is read; its feature size may differ from that of the keys.
    mask: broadcasts to `(*b, h, n, m)`; True takes part. None: all do.
    bias: broadcasts to `(*b, h, n, m)`; added after the scaling.
    scale: factor of the products; None is 1/√d.
    precision: of both matrix products, as in `jax.lax.dot_general`.
    implementation: 'dense' keeps the scores of all pairs; 'chunked' never does
      and has a gradient but no forward-mode derivative; 'cudnn' needs an NVIDIA
      GPU, 'splash' a TPU, and both leave `precision` to the kernel. None takes
      what `choose_implementation` says.
    chunk: largest number of queries and of keys of a chunk, or one number for
      both; naming it means 'chunked'.

  Returns:
    Messages in the dtype of the values; exact zeros for a row in which nothing
    takes part.

  Raises:
    ValueError: the shapes do not fit together, or the implementation does not
      take these arguments.
    TypeError: the mask is not Boolean.

  Example:
    >>> queries = jnp.ones((2, 1, 4))
    >>> values = jnp.array([[[2.0]], [[4.0]]])
    >>> mask = jnp.array([[True, True], [False, False]])
    >>> attend(queries, queries, values, mask=mask).ravel().tolist()
    [3.0, 0.0]

  Source: Attention Is All You Need (2017), arXiv 1706.03762.
  """
  _check(queries, keys, mask, bias)
  if values.shape[:-1] != keys.shape[:-1]:
    raise ValueError(
      'values must match keys in all axes but the last: '
      f'{values.shape=} {keys.shape=}'
    )
  if scale is None:
    scale = 1 / math.sqrt(queries.shape[-1])
  chosen = resolve_implementation(
    implementation, chunk, queries, keys, values, mask=mask, bias=bias
  )
  if chosen == 'chunked':
    return attend_in_chunks(
      queries,
      keys,
      values,
      mask=mask,
      bias=bias,
      scale=scale,
      precision=precision,
      chunk=chunk,
    ).messages
  if chosen == 'cudnn':
    return cudnn_attention(
      queries, keys, values, mask=mask, bias=bias, scale=scale
    )
  if chosen == 'splash':
    return splash_attention(queries, keys, values, scale=scale)
  if queries.shape[-3] * keys.shape[-3] < FUSED_SCORES:
    weights = attention_weights(
      queries, keys, mask=mask, bias=bias, scale=scale, precision=precision
    )
    return weighted_sum(weights, values, precision=precision)
  messages = softmax_attended(
    *(jnp.swapaxes(x, -3, -2) for x in (queries, keys, values)),
    mask=mask,
    bias=bias,
    scale=scale,
    precision=precision,
  ).messages
  return jnp.swapaxes(messages, -3, -2)


def weighted_sum(
  weights: Float[Array, '*b h n m'],
  values: Float[Array, '*b m h f'],
  *,
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, '*b n h f']:
  r"""Messages of given weights: o = Σ_m A_m v_m, summed in float32.

  Args:
    weights: as `attention_weights` gives them.
    values: what is read.
    precision: of the matrix product, as in `jax.lax.dot_general`.

  Returns:
    Messages in the dtype of the values.
  """
  return jnp.einsum(
    '...hnm,...mhf->...nhf',
    weights.astype(values.dtype),
    values,
    precision=precision,
    preferred_element_type=jnp.float32,
  ).astype(values.dtype)


def _check(
  queries: Array, keys: Array, mask: Array | None, bias: Array | None
) -> None:
  if queries.ndim != keys.ndim or (
    queries.shape[:-3] + queries.shape[-2:] != keys.shape[:-3] + keys.shape[-2:]
  ):
    raise ValueError(
      'queries and keys must agree in all axes but the third from the end: '
      f'{queries.shape=} {keys.shape=}'
    )
  shape = (
    *queries.shape[:-3],
    queries.shape[-2],
    queries.shape[-3],
    keys.shape[-3],
  )
  if mask is not None and mask.dtype != jnp.bool_:
    raise TypeError(f'mask must be Boolean, True takes part: {mask.dtype=}')
  for name, array in (('mask', mask), ('bias', bias)):
    if array is not None and not _broadcasts(array.shape, shape):
      raise ValueError(
        f'{name} must broadcast to (*b, h, n, m) = {shape}: '
        f'{name}.shape={array.shape}'
      )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
  return len(shape) <= len(to) and all(
    size in (1, goal)
    for size, goal in zip(reversed(shape), reversed(to), strict=False)
  )
