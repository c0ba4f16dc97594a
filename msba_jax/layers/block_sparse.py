r"""The loops of attention over chosen blocks, forward and backward.

Rows of blocks are sorted by how many blocks they name, and taken a group at a
time; the blocks they name are gathered a few at a time, as many as the fullest
row of the group needs. So little more is computed than what is named.

Attributes:
  sparse_attention: messages and log-normalisers, with gradients for both.
  sparse_gradients: the gradients of one share of the keys.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from msba_jax.layers.blocks import (
  BlockPlan,
  add_blocks,
  block_scores,
  gather_blocks,
  in_blocks,
  order_choices,
  order_rows,
  product,
  run_steps,
)
from msba_jax.layers.chunks import map_heads
from msba_jax.layers.online import (
  Attended,
  add_scores,
  begin_rows,
  finish_rows,
  row_shift,
  shifted_or_not,
)
from msba_jax.layers.varying import varying_alike, varying_like

__all__ = ['sparse_attention', 'sparse_gradients']


def sparse_attention(
  plan: BlockPlan,
  queries: Float[Array, 'g n d'],
  keys: Float[Array, 'g m d'],
  values: Float[Array, 'g m f'],
  indices: Int[Array, 'c i k'],
) -> Attended:
  """Messages and log-normalisers over the chosen blocks.

  Args:
    plan: of these shapes.
    queries: what asks, one slice a head.
    keys: what answers.
    values: what is read.
    indices: choices of blocks; what is no block stands for nothing.

  Returns:
    Messages and normalisers; both are differentiable by queries, keys and
    values. A row that names nothing has zero messages and −∞.
  """
  return _attention(plan, *varying_alike(queries, keys, values, indices))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, queries, keys, values, indices) -> Attended:
  return _forward(plan, queries, keys, values, indices)


def _attention_forward(plan, queries, keys, values, indices):
  attended = _forward(plan, queries, keys, values, indices)
  return attended, (queries, keys, values, indices, attended)


def _attention_backward(plan, residuals, cotangent):
  queries, keys, values, indices, attended = residuals
  return sparse_gradients(
    plan,
    queries,
    keys,
    values,
    indices,
    attended.normalizer,
    row_shift(attended, cotangent),
    cotangent.messages,
  )


_attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.jit, static_argnums=0)
def _forward(plan: BlockPlan, queries, keys, values, indices) -> Attended:
  n, m = queries.shape[1], keys.shape[1]
  queries = in_blocks(queries, plan.rows, plan.group)
  keys, values = (in_blocks(x, plan.columns) for x in (keys, values))
  indices = order_choices(plan, indices, keys.shape[1], queries.shape[1])

  def head(query, key, value, indices_of):
    named = indices[indices_of]
    order, back = order_rows(plan, named, len(key))

    def all_groups(shifted):
      def group(places):
        asking, names = query[places], named[places]

        def step(chosen, seen):
          scores = block_scores(plan, m, asking, key, chosen)
          read = gather_blocks(value, chosen)
          return add_scores(
            seen,
            scores,
            lambda x: product(
              plan, 'abk,akf->abf', x.astype(value.dtype), read
            ),
            shifted=shifted,
          )

        shape = asking.shape[:2]
        start = begin_rows(shape, value.shape[-1], shifted=shifted)
        seen = run_steps(plan, names, len(key), step, start)
        return finish_rows(seen, value.dtype)

      return jax.lax.map(group, order)

    # float16 does not hold exp(40).
    if plan.together or value.dtype == jnp.float16:
      messages, normalizer = all_groups(shifted=True)
    else:
      messages, normalizer = shifted_or_not(all_groups, query, key, plan.scale)
    messages = messages.reshape(query.shape[:2] + messages.shape[-1:])
    normalizer = normalizer.reshape(query.shape[:2])
    return (
      messages[back].reshape(-1, messages.shape[-1])[:n],
      normalizer[back].reshape(-1)[:n],
    )

  of = jnp.asarray(plan.indices_of, jnp.int32)
  return Attended(*map_heads(plan, head, (queries, keys, values, of)))


@functools.partial(jax.jit, static_argnums=0)
def sparse_gradients(
  plan: BlockPlan,
  queries: Float[Array, 'g n d'],
  keys: Float[Array, 'g m d'],
  values: Float[Array, 'g m f'],
  indices: Int[Array, 'c i k'],
  normalizer: Float[Array, 'g n'],
  shift: Float[Array, 'g n'],
  cotangent: Float[Array, 'g n f'],
) -> tuple[Array, Array, Array, None]:
  """Gradients by one share of the keys, as `chunked_gradients` has them.

  Args:
    plan: of these shapes.
    queries: what asks.
    keys: this share of what answers.
    values: of these keys.
    indices: choices among the blocks of this share.
    normalizer: log-normalisers over all keys.
    shift: ∂message · message − ∂normalizer of every row.
    cotangent: ∂message.

  Returns:
    Gradients by queries, keys and values, and None for the indices.
  """
  n, m = queries.shape[1], keys.shape[1]
  # A row without keys, and a row that is padding, has weights exp(· − ∞) = 0.
  normalizer = jnp.where(normalizer == -jnp.inf, jnp.inf, normalizer)
  queries, cotangent, normalizer, shift = (
    in_blocks(x, plan.rows, plan.group, fill)
    for x, fill in (
      (queries, 0.0),
      (cotangent, 0.0),
      (normalizer[..., None], jnp.inf),
      (shift[..., None], 0.0),
    )
  )
  keys, values = (in_blocks(x, plan.columns) for x in (keys, values))
  indices = order_choices(plan, indices, keys.shape[1], queries.shape[1])

  def head(query, key, value, lse, down, arriving, indices_of):
    named = indices[indices_of]
    order, back = order_rows(plan, named, len(key))

    def group(totals, places):
      asking, names, change = query[places], named[places], arriving[places]
      row_lse, row_shift = lse[places], down[places]

      def step(chosen, carry):
        by_key, by_value, by_query = carry
        scores = block_scores(plan, m, asking, key, chosen)
        weights = jnp.exp(scores - row_lse)
        steps = product(
          plan, 'abf,akf->abk', change, gather_blocks(value, chosen)
        )
        small = (weights * (steps - row_shift)).astype(query.dtype)
        weights = weights.astype(value.dtype)
        by_query += product(
          plan, 'abk,akd->abd', small, gather_blocks(key, chosen)
        )
        # Features × keys, as in `chunked_gradients`.
        by_key = add_blocks(
          by_key, chosen, product(plan, 'abd,abk->adk', asking, small)
        )
        by_value = add_blocks(
          by_value, chosen, product(plan, 'abf,abk->afk', change, weights)
        )
        return by_key, by_value, by_query

      start = (*totals, jnp.zeros(asking.shape, jnp.float32))
      *totals, by_query = run_steps(plan, names, len(key), step, start)
      return tuple(totals), by_query

    start = tuple(
      varying_like(
        jnp.zeros((len(x), x.shape[-1], plan.columns), jnp.float32), query
      )
      for x in (key, value)
    )
    (by_key, by_value), by_query = jax.lax.scan(group, start, order)
    by_query = by_query.reshape(query.shape)[back]
    by_key, by_value = (
      jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1])[:m]
      for x in (by_key, by_value)
    )
    return (
      (by_query.reshape(-1, query.shape[-1])[:n] * plan.scale).astype(
        query.dtype
      ),
      (by_key * plan.scale).astype(key.dtype),
      by_value.astype(value.dtype),
    )

  of = jnp.asarray(plan.indices_of, jnp.int32)
  heads = (queries, keys, values, normalizer, shift, cotangent, of)
  by_query, by_key, by_value = map_heads(plan, head, heads)
  return by_query, by_key, by_value, None
