r"""The loops of attention over chosen blocks, forward and backward.

Rows of blocks are sorted by how many blocks they name, and taken a group at a
time; the blocks they name are gathered, as many as the fullest row of the group
needs: all at once where they are few, and otherwise some at a time. So little
more is computed than what is named.

Attributes:
  sparse_attention: messages and log-normalisers, with gradients for both.
  sparse_gradients: the gradients of one share of the keys.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from msba_jax.layers.block_plan import BlockPlan
from msba_jax.layers.blocks import (
  add_blocks,
  block_scores,
  chosen_blocks,
  gather_blocks,
  in_blocks,
  key_bias,
  order_rows,
  over_slices,
  product,
  run_steps,
  take_rows,
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
from msba_jax.layers.softmax import softmax_attended
from msba_jax.layers.varying import varying_alike, varying_like

__all__ = ['sparse_attention', 'sparse_gradients']


def sparse_attention(
  plan: BlockPlan,
  queries: Float[Array, 'g n d'],
  keys: Float[Array, 'g m d'],
  values: Float[Array, 'g m f'],
  indices: Int[Array, 'c i k'],
  bias: Float[Array, 'c i l'] | None = None,
) -> Attended:
  """Messages and log-normalisers over the chosen blocks.

  Args:
    plan: of these shapes.
    queries: what asks, one slice a head.
    keys: what answers.
    values: what is read.
    indices: choices of blocks behind the leading ones; what is no such block
      stands for nothing.
    bias: of the keys of the leading blocks, which every row reads; has no
      gradient.

  Returns:
    Messages and normalisers; both are differentiable by queries, keys and
    values. A row that names nothing has zero messages and −∞.
  """
  return _attention(plan, *varying_alike(queries, keys, values, indices, bias))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, queries, keys, values, indices, bias) -> Attended:
  return _forward(plan, bool(plan.widths), queries, keys, values, indices, bias)


def _attention_forward(plan, queries, keys, values, indices, bias):
  # With normalisers there is no kernel.
  attended = _forward(plan, False, queries, keys, values, indices, bias)
  return attended, (queries, keys, values, indices, bias, attended)


def _attention_backward(plan, residuals, cotangent):
  queries, keys, values, indices, bias, attended = residuals
  gradients = sparse_gradients(
    plan,
    queries,
    keys,
    values,
    indices,
    attended.normalizer,
    row_shift(attended, cotangent),
    cotangent.messages,
    bias,
  )
  return *gradients, None, None


_attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(
  plan: BlockPlan, kernels: bool, queries, keys, values, indices, bias
) -> Attended:
  """Kernels where rows name few blocks, or steps alone."""
  slices = len(plan.indices_of) if kernels else 1
  n, m = queries.shape[1], keys.shape[1]
  keep = indices.shape[-1] + plan.leading

  def run(query, key, value, chosen):
    order, back = order_rows(plan.kernel if kernels else plan.group, chosen)
    # float16 does not hold exp(40).
    bounded = value.dtype != jnp.float16 and scores_bounded(
      query, key, plan.scale
    )

    def group(places):
      asking, some = take_rows((query, chosen), places)

      def at_once(width):
        part = some.slots(0, width)
        return softmax_attended(
          asking,
          gather_blocks(key, part),
          gather_blocks(value, part),
          bias=key_bias(plan, part),
          scale=plan.scale,
          precision=plan.precision,
        )

      def in_steps(shifted):
        def step(part, seen):
          read = gather_blocks(value, part)
          return add_scores(
            seen,
            block_scores(plan, m, asking, key, part),
            lambda x: product(
              plan, 'abk,akf->abf', x.astype(value.dtype), read
            ),
            shifted=shifted,
          )

        start = begin_rows(asking.shape[:2], value.shape[-1], shifted=shifted)
        return finish_rows(run_steps(plan, some, step, start), value.dtype)

      if plan.together:
        return in_steps(shifted=True)
      widths = plan.widths if kernels else ()
      branches = [functools.partial(at_once, width) for width in widths]
      if keep not in widths:
        branches.append(functools.partial(shifted_or_not, in_steps, bounded))
      wider = some.fullest() > jnp.asarray(widths, jnp.int32)
      return jax.lax.switch(jnp.sum(wider), branches)

    return jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[2:])[back], jax.lax.map(group, order)
    )

  attended = over_slices(
    plan,
    slices,
    run,
    in_blocks(queries, plan.rows),
    in_blocks(keys, plan.columns),
    in_blocks(values, plan.columns),
    chosen_blocks(plan, slices, indices, m, bias),
  )
  return jax.tree.map(
    lambda x: x.reshape(len(x), -1, *x.shape[3:])[:, :n], attended
  )


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
  bias: Float[Array, 'c i l'] | None = None,
) -> tuple[Array, Array, Array]:
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
    bias: of the keys of the leading blocks.

  Returns:
    Gradients by queries, keys and values.
  """
  n, m = queries.shape[1], keys.shape[1]
  # A row without keys has weights exp(· − ∞) = 0.
  normalizer = jnp.where(normalizer == -jnp.inf, jnp.inf, normalizer)

  def run(query, lse, down, arriving, key, value, chosen):
    order, back = order_rows(plan.group, chosen)

    def group(totals, places):
      asking, row_lse, row_shift, change, some = take_rows(
        (query, lse, down, arriving, chosen), places
      )

      def step(part, carry):
        by_key, by_value, by_query = carry
        weights = jnp.exp(block_scores(plan, m, asking, key, part) - row_lse)
        steps = product(
          plan, 'abf,akf->abk', change, gather_blocks(value, part)
        )
        small = (weights * (steps - row_shift)).astype(query.dtype)
        weights = weights.astype(value.dtype)
        by_query += product(
          plan, 'abk,akd->abd', small, gather_blocks(key, part)
        )
        # Features × keys, as in `chunked_gradients`.
        by_key = add_blocks(
          by_key, part, product(plan, 'abd,abk->adk', asking, small)
        )
        by_value = add_blocks(
          by_value, part, product(plan, 'abf,abk->afk', change, weights)
        )
        return by_key, by_value, by_query

      start = (*totals, jnp.zeros(asking.shape, jnp.float32))
      *totals, by_query = run_steps(plan, some, step, start)
      return tuple(totals), by_query

    start = tuple(
      varying_like(
        jnp.zeros((len(x), x.shape[-1], plan.columns), jnp.float32), query
      )
      for x in (key, value)
    )
    (by_key, by_value), by_query = jax.lax.scan(group, start, order)
    by_query = by_query.reshape(-1, *by_query.shape[2:])[back]
    return by_query, jnp.swapaxes(by_key, 1, 2), jnp.swapaxes(by_value, 1, 2)

  queries_of, lse, down, arriving = (
    in_blocks(x, plan.rows)
    for x in (queries, normalizer[..., None], shift[..., None], cotangent)
  )
  by_query, by_key, by_value = (
    x.reshape(len(x), -1, x.shape[-1])
    for x in over_slices(
      plan,
      1,
      run,
      queries_of,
      lse,
      down,
      arriving,
      in_blocks(keys, plan.columns),
      in_blocks(values, plan.columns),
      chosen_blocks(plan, 1, indices, m, bias),
    )
  )
  return (
    (by_query[:, :n] * plan.scale).astype(queries.dtype),
    (by_key[:, :m] * plan.scale).astype(keys.dtype),
    by_value[:, :m].astype(values.dtype),
  )
