"""The gradient of attention in chunks, by one share of the keys at a time.

Attributes:
  chunked_gradients: by queries, keys, values and bias.

Source: FlashAttention-2 (2023), arXiv 2307.08691.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from msba_jax.layers.chunks import (
  Plan,
  join_blocks,
  map_heads,
  pad_to_chunks,
  product,
  scan_chunks,
  scorer,
  shared_slices,
  sum_shared,
  take_chunk,
)
from msba_jax.layers.varying import varying_like

__all__ = ['chunked_gradients']


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
