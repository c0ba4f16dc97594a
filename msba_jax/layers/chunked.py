r"""Exact attention of which no array of all scores ever stands in memory.

Queries are taken a chunk at a time and keys a chunk at a time, with the online
softmax: the running maximum, total and sum of values of a row are corrected
when a later chunk holds a larger score. The gradient is our own: it computes
the scores of a chunk again from the log-normaliser that the forward pass kept.
Besides the arguments and their gradients, memory is O(n + m) a head and one
chunk of scores.

On CPU the heads run one after the other, since one chunk of one head fills the
cores and the cache; elsewhere they run together.

Attributes:
  Attended: messages and log-normalisers.
  attend_in_chunks: the same in the layout of `attend`.
  chunked_attention: messages and log-normalisers, with gradients for both.
  chunked_gradients: the gradients of one share of the keys.

Source: Online normalizer calculation for softmax (2018), arXiv 1805.02867;
Self-attention Does Not Need O(n²) Memory (2021), arXiv 2112.05682;
FlashAttention-2 (2023), arXiv 2307.08691.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from msba_jax.layers.chunks import (
  Plan,
  heads_last,
  join_blocks,
  laid_out,
  map_heads,
  pad_to_chunks,
  product,
  scan_chunks,
  scorer,
  shared_slices,
  sum_shared,
  take_chunk,
)
from msba_jax.layers.varying import varying_alike, varying_like

__all__ = [
  'Attended',
  'attend_in_chunks',
  'chunked_attention',
  'chunked_gradients',
]


class Attended(NamedTuple):
  """Messages, and the log of the sum of exponentials of every row.

  Attributes:
    messages: (g, n, f) in the dtype of the values.
    normalizer: (g, n) float32; −∞ for a row in which nothing takes part.
  """

  messages: Array
  normalizer: Array


def chunked_attention(
  plan: Plan,
  queries: Float[Array, 'g n d'],
  keys: Float[Array, 'g m d'],
  values: Float[Array, 'g m f'],
  mask: Array | None = None,
  bias: Array | None = None,
) -> Attended:
  r"""Messages o = softmax_m(scale · q·k + bias) v and their normalisers.

  Args:
    plan: of these shapes.
    queries: what asks, one slice a head.
    keys: what answers.
    values: what is read.
    mask: (masks, n / t or 1, m / s or 1) for `plan.tile = (t, s)`; True takes
      part.
    bias: (biases, n or 1, m or 1), added to the scaled scores.

  Returns:
    Messages and normalisers; both are differentiable by queries, keys, values
    and bias. A row in which nothing takes part has zero messages and −∞.
  """
  arrays = varying_alike(queries, keys, values, mask, bias)
  return _attention(plan, *arrays)


def attend_in_chunks(
  queries: Float[Array, '*b n h d'],
  keys: Float[Array, '*b m h d'],
  values: Float[Array, '*b m h f'],
  *,
  mask: Array | None = None,
  bias: Array | None = None,
  scale: float,
  precision: jax.lax.PrecisionLike = None,
  chunk: tuple[int, int],
  tile: tuple[int, int] = (1, 1),
) -> Attended:
  """`chunked_attention` in the layout of `attend`.

  Args:
    queries: what asks.
    keys: what answers.
    values: what is read.
    mask: broadcasts to (*b, h, n / t, m / s) for `tile = (t, s)`.
    bias: broadcasts to (*b, h, n, m).
    scale: factor of the products.
    precision: of the matrix products.
    chunk: largest number of queries and of keys of a chunk.
    tile: queries and keys that share one entry of the mask.

  Returns:
    Messages (*b, n, h, f) and normalisers (*b, n, h).
  """
  lead = (*queries.shape[:-3], queries.shape[-2])
  plan, arrays = laid_out(
    queries, keys, values, mask, bias, scale, precision, chunk, tile
  )
  attended = chunked_attention(plan, *arrays)
  return Attended(*(heads_last(x, lead[:-1], lead[-1]) for x in attended))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, queries, keys, values, mask, bias) -> Attended:
  return _forward(plan, queries, keys, values, mask, bias)


def _attention_forward(plan, queries, keys, values, mask, bias):
  attended = _forward(plan, queries, keys, values, mask, bias)
  return attended, (queries, keys, values, mask, bias, attended)


def _attention_backward(plan, residuals, cotangent):
  queries, keys, values, mask, bias, attended = residuals
  # A change of the normaliser and of the messages meet in the same place:
  # ∂score = weight · (∂message · value − shift).
  shift = (
    jnp.sum(
      cotangent.messages.astype(jnp.float32)
      * attended.messages.astype(jnp.float32),
      axis=-1,
    )
    - cotangent.normalizer
  )
  return chunked_gradients(
    plan,
    queries,
    keys,
    values,
    mask,
    bias,
    attended.normalizer,
    shift,
    cotangent.messages,
  )


_attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.jit, static_argnums=0)
def _forward(plan: Plan, queries, keys, values, mask, bias) -> Attended:
  n, m = queries.shape[1], keys.shape[1]
  padded = pad_to_chunks(plan, queries, keys, values, mask, bias)
  queries, keys, values, mask, bias = padded
  row_chunks = queries.shape[1] // plan.rows
  column_chunks = keys.shape[1] // plan.columns

  def head(query, key, value, mask_of, bias_of):
    score = scorer(plan, m, mask, mask_of, bias, bias_of)

    def rows(i):
      asking = take_chunk(query, i, plan.rows)

      def columns(carry, j):
        peak, total, read = carry
        scores = score(asking, take_chunk(key, j, plan.columns), i, j)
        highest = jnp.maximum(peak, jnp.max(scores, axis=-1))
        # A row of −∞ so far is shifted by zero: exp(−∞ − 0) is zero.
        shift = jnp.where(highest == -jnp.inf, 0, highest)
        raised = jnp.exp(scores - shift[:, None])
        fade = jnp.exp(peak - shift)
        total = total * fade + jnp.sum(raised, axis=-1)
        read = read * fade[:, None] + product(
          plan,
          raised.astype(value.dtype),
          take_chunk(value, j, plan.columns),
          1,
          0,
        )
        return (highest, total, read), None

      start = (
        jnp.full(plan.rows, -jnp.inf, jnp.float32),
        jnp.zeros(plan.rows, jnp.float32),
        jnp.zeros((plan.rows, value.shape[-1]), jnp.float32),
      )
      peak, total, read = scan_chunks(columns, start, column_chunks, query)[0]
      alive = total > 0
      total = jnp.where(alive, total, 1)
      message = (read / total[:, None]).astype(value.dtype)
      return message, jnp.where(alive, jnp.log(total) + peak, -jnp.inf)

    messages, normalizer = jax.lax.map(rows, jnp.arange(row_chunks))
    return (
      messages.reshape(-1, messages.shape[-1])[:n],
      normalizer.reshape(-1)[:n],
    )

  heads = (queries, keys, values, *shared_slices(plan, len(queries)))
  return Attended(*map_heads(plan, head, heads))


@functools.partial(jax.jit, static_argnums=0)
def chunked_gradients(
  plan: Plan,
  queries: Float[Array, 'g n d'],
  keys: Float[Array, 'g m d'],
  values: Float[Array, 'g m f'],
  mask: Array | None,
  bias: Array | None,
  normalizer: Float[Array, 'g n'],
  shift: Float[Array, 'g n'],
  cotangent: Float[Array, 'g n f'],
) -> tuple[Array, Array, Array, None, Array | None]:
  r"""Gradients by one share of the keys, given what all keys made together.

  With w = exp(score − normalizer) the weights of these keys among all,
  ∂score = w (∂message · value − shift). Shares of the keys can be taken one
  after the other, as a ring of devices does: the gradients by the queries are
  the sum over shares.

  Args:
    plan: of these shapes.
    queries: what asks.
    keys: this share of what answers.
    values: of these keys.
    mask: as in `chunked_attention`.
    bias: as in `chunked_attention`.
    normalizer: log-normalisers over all keys.
    shift: ∂message · message − ∂normalizer of every row.
    cotangent: ∂message.

  Returns:
    Gradients by queries, keys, values, None for the mask, and by the bias.
  """
  m = keys.shape[1]
  shapes = queries.shape, keys.shape, values.shape
  padded = pad_to_chunks(plan, queries, keys, values, mask, bias)
  given_bias = bias
  queries, keys, values, mask, bias = padded
  rows = queries.shape[1] - shapes[0][1]
  row_chunks = queries.shape[1] // plan.rows
  column_chunks = keys.shape[1] // plan.columns
  # A row without keys, and a row that is padding, has weights exp(· − ∞) = 0.
  normalizer = jnp.where(normalizer == -jnp.inf, jnp.inf, normalizer)
  normalizer = jnp.pad(normalizer, ((0, 0), (0, rows)), constant_values=jnp.inf)
  shift = jnp.pad(shift, ((0, 0), (0, rows)))
  cotangent = jnp.pad(cotangent, ((0, 0), (0, rows), (0, 0)))

  def head(query, key, value, lse, down, arriving, mask_of, bias_of):
    score = scorer(plan, m, mask, mask_of, bias, bias_of)

    def columns(query_gradient, j):
      answering = take_chunk(key, j, plan.columns)
      read = take_chunk(value, j, plan.columns)

      def rows(carry, i):
        asking = take_chunk(query, i, plan.rows)
        change = take_chunk(arriving, i, plan.rows)
        scores = score(asking, answering, i, j)
        weights = jnp.exp(scores - take_chunk(lse, i, plan.rows)[:, None])
        change_of_weights = product(plan, change, read, 1, 1)
        steps = weights * (
          change_of_weights - take_chunk(down, i, plan.rows)[:, None]
        )
        small = steps.astype(query.dtype)
        # Features × keys: the product then runs along the rows of both.
        key_gradient = carry[0] + product(plan, asking, small, 0, 0)
        value_gradient = carry[1] + product(
          plan, change, weights.astype(value.dtype), 0, 0
        )
        by_query = product(plan, small, answering, 1, 0)
        return (key_gradient, value_gradient), (
          by_query,
          sum_shared(steps, bias),
        )

      start = (
        jnp.zeros((key.shape[-1], plan.columns), jnp.float32),
        jnp.zeros((value.shape[-1], plan.columns), jnp.float32),
      )
      (by_key, by_value), (by_query, by_bias) = scan_chunks(
        rows, start, row_chunks, query
      )
      query_gradient = query_gradient + by_query.reshape(query.shape)
      by_bias = join_blocks(by_bias, 0, bias)
      return query_gradient, (by_key, by_value, by_bias)

    start = jnp.zeros(query.shape, jnp.float32)
    by_query, (by_key, by_value, by_bias) = scan_chunks(
      columns, start, column_chunks, query
    )
    by_bias = join_blocks(by_bias, 1, bias)
    by_key, by_value = (
      jnp.moveaxis(x, 1, 2).reshape(-1, x.shape[1]) for x in (by_key, by_value)
    )
    return (
      (by_query * plan.scale).astype(query.dtype),
      (by_key * plan.scale).astype(key.dtype),
      by_value.astype(value.dtype),
    ), by_bias

  heads = (queries, keys, values, normalizer, shift, cotangent)
  heads += shared_slices(plan, len(queries))
  gradients, by_bias = _over_heads(plan, head, heads, bias)
  if by_bias is not None and given_bias is not None:
    height, width = given_bias.shape[1:]
    by_bias = by_bias[:, :height, :width].astype(given_bias.dtype)
  by_query, by_key, by_value = (
    x[:, : shape[1]] for x, shape in zip(gradients, shapes, strict=True)
  )
  return by_query, by_key, by_value, None, by_bias


def _over_heads(plan, head, heads, bias):
  """Gradients of every head, and the sum of those by a bias they share."""
  if bias is None or plan.together:
    gradients, by_bias = map_heads(plan, head, heads)
    # Every head has a bias of its own here, in some order.
    return gradients, None if bias is None else by_bias[
      np.argsort(plan.bias_of)
    ]

  def add(total, arrays):
    gradients, by_bias = head(*arrays)
    return total.at[arrays[-1]].add(by_bias), gradients

  total = varying_like(jnp.zeros(bias.shape, jnp.float32), heads[0])
  by_bias, gradients = jax.lax.scan(add, total, heads)
  return gradients, by_bias
