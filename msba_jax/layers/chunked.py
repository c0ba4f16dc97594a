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
  attend_in_chunks: the same in the layout of `attend`.
  chunked_attention: messages and log-normalisers, with gradients for both.

Source: Online normalizer calculation for softmax (2018), arXiv 1805.02867;
Self-attention Does Not Need O(n²) Memory (2021), arXiv 2112.05682;
FlashAttention-2 (2023), arXiv 2307.08691.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.layers.chunked_gradients import chunked_gradients
from msba_jax.layers.chunks import (
  Plan,
  heads_last,
  laid_out,
  map_heads,
  pad_to_chunks,
  product,
  scan_chunks,
  scorer,
  shared_slices,
  take_chunk,
)
from msba_jax.layers.online import (
  Attended,
  add_scores,
  begin_rows,
  finish_rows,
  row_shift,
  scores_bounded,
  shifted_or_not,
)
from msba_jax.layers.varying import varying_alike

__all__ = ['attend_in_chunks', 'chunked_attention']


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
  chunk: int | tuple[int, int] | None = None,
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
    chunk: largest number of queries and of keys of a chunk, or one number for
      both; None is what suits the platform.
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
  return chunked_gradients(
    plan,
    queries,
    keys,
    values,
    mask,
    bias,
    attended.normalizer,
    row_shift(attended, cotangent),
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

    def all_rows(shifted):
      def rows(i):
        asking = take_chunk(query, i, plan.rows)

        def columns(seen, j):
          scores = score(asking, take_chunk(key, j, plan.columns), i, j)
          read = take_chunk(value, j, plan.columns)
          return add_scores(
            seen,
            scores,
            lambda x: product(plan, x.astype(value.dtype), read, 1, 0),
            shifted=shifted,
          ), None

        start = begin_rows((plan.rows,), value.shape[-1], shifted=shifted)
        seen, _ = scan_chunks(columns, start, column_chunks, query)
        return finish_rows(seen, value.dtype)

      return jax.lax.map(rows, jnp.arange(row_chunks))

    # A bias may be of any size, and float16 does not hold exp(40).
    if bias is not None or plan.together or value.dtype == jnp.float16:
      messages, normalizer = all_rows(shifted=True)
    else:
      messages, normalizer = shifted_or_not(
        all_rows, scores_bounded(query, key, plan.scale)
      )
    return (
      messages.reshape(-1, messages.shape[-1])[:n],
      normalizer.reshape(-1)[:n],
    )

  heads = (queries, keys, values, *shared_slices(plan, len(queries)))
  return Attended(*map_heads(plan, head, heads))
