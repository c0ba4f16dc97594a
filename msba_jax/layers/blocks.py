"""How attention over chosen blocks is cut into steps of groups of blocks.

Attributes:
  BlockPlan: the static facts of a call of `sparse_attention`.
  plan_blocks: a plan from the sizes of a call.
  in_blocks: an axis of tokens as blocks of tokens.
  order_choices: every row of a choice ascending, without repetition.
  order_rows: rows of blocks by how many blocks they name.
  block_scores: the scores of one step.
  run_steps: as many steps as a group needs.
  gather_blocks, add_blocks: to and from the chosen blocks.
  product: a batched matrix product that accumulates in float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from msba_jax.layers.chunks import mask_tiles
from msba_jax.layers.varying import varying_like

__all__ = [
  'BlockPlan',
  'add_blocks',
  'block_scores',
  'gather_blocks',
  'in_blocks',
  'order_choices',
  'order_rows',
  'plan_blocks',
  'product',
  'run_steps',
]

# Queries and keys of a step on CPU: large enough for the matrix products, small
# enough for the cache.
STEP = (512, 1024)


@dataclasses.dataclass(frozen=True)
class BlockPlan:
  """The static facts of a call of `sparse_attention`.

  Attributes:
    rows: queries of a block.
    columns: keys of a block.
    group: blocks of queries of a step; 0 is all.
    slots: chosen blocks of a step.
    scale: factor of the products.
    precision: of the matrix products.
    indices_of: the choice of every head, an index into the leading axis.
    together: whether all heads run at once.
  """

  rows: int
  columns: int
  group: int
  slots: int
  scale: float
  precision: jax.lax.PrecisionLike
  indices_of: tuple[int, ...]
  together: bool


def plan_blocks(
  rows: int,
  columns: int,
  *,
  count: int,
  keep: int,
  scale: float,
  indices_of: tuple[int, ...],
  precision: jax.lax.PrecisionLike = None,
  shares: int = 1,
  least_steps: int = 1,
) -> BlockPlan:
  """Steps of a size that suits the platform.

  Args:
    rows: queries of a block.
    columns: keys of a block.
    count: blocks of queries.
    keep: blocks that a row may name.
    scale: factor of the products.
    indices_of: the choice of every head.
    precision: of the matrix products.
    shares: into how many calls the keys are divided, each with its part of what
      a row names.
    least_steps: into how many steps a row is cut at least, where most rows name
      fewer blocks than they may.

  Returns:
    The plan.
  """
  alone = jax.default_backend() == 'cpu'
  most = max(1, min(STEP[1] // columns, -(-keep // shares)))
  steps = max(least_steps, -(-keep // most))
  return BlockPlan(
    rows=rows,
    columns=columns,
    group=max(1, min(STEP[0] // rows, count)) if alone else 0,
    slots=max(1, -(-keep // steps)),
    scale=scale,
    precision=precision,
    indices_of=indices_of,
    together=not alone,
  )


def block_scores(plan, m, asking, key, chosen):
  """Scores of a group against a few chosen blocks each."""
  scores = product(plan, 'abd,akd->abk', asking, gather_blocks(key, chosen))
  scores = mask_tiles(scores * plan.scale, (chosen < len(key))[:, None])
  if m % plan.columns:
    token = jnp.arange(plan.columns)[None, None]
    token = chosen[..., None] * plan.columns + token
    scores = mask_tiles(scores, token.reshape(len(chosen), 1, -1) < m)
  return scores


def run_steps(plan, names, count, step, start):
  """Takes what a group names, `slots` blocks at a time.

  `step(chosen, result)` gives the next result; chosen is (group, blocks). The
  last step is as wide as the fullest row of the group needs, rounded up to a
  quarter of the others; where heads run together, a branch would cost as much
  as all of them do, and all steps are equal.
  """

  def visit(first, width, result):
    chosen = jax.lax.dynamic_slice_in_dim(names, first, width, axis=1)
    return step(chosen, result)

  def whole_step(j, result):
    return visit(j * plan.slots, plan.slots, result)

  start = jax.tree.map(lambda x: varying_like(x, names), start)
  if plan.together and names.shape[1] == plan.slots:
    return step(names, start)
  most = jnp.max(jnp.sum(names < count, axis=1))
  if plan.together:
    return jax.lax.fori_loop(0, -(-most // plan.slots), whole_step, start)
  whole = most // plan.slots
  result = jax.lax.fori_loop(0, whole, whole_step, start)
  quarter = -(-plan.slots // 4)
  widths = [*range(quarter, plan.slots, quarter), plan.slots]
  last = [functools.partial(visit, whole * plan.slots, x) for x in widths]
  rest = most - whole * plan.slots
  return jax.lax.switch(-(-rest // quarter), [lambda x: x, *last], result)


def order_rows(plan, named, count):
  """Rows of blocks, a group a line, fullest last; and where each row went."""
  order = jnp.argsort(jnp.sum(named < count, axis=1))
  group = plan.group or len(named)
  return order.reshape(-1, group), jnp.argsort(order)


def order_choices(plan, indices, count, rows):
  """Every row ascending, each block once; `count` stands for nothing."""
  there = (indices >= 0) & (indices < count)
  indices = jnp.sort(jnp.where(there, indices, count), axis=-1)
  again = indices[..., 1:] == indices[..., :-1]
  again = jnp.pad(again, ((0, 0), (0, 0), (1, 0)))
  indices = jnp.sort(jnp.where(again, count, indices), axis=-1)
  # The last step must find whole slots: a slice that reached over the end would
  # be moved back, over blocks that were there before.
  padding = (
    (0, 0),
    (0, rows - indices.shape[1]),
    (0, -indices.shape[2] % plan.slots),
  )
  return jnp.pad(indices, padding, constant_values=count)


def in_blocks(array, size, group=1, fill=0.0):
  """(g, n, d) as (g, blocks, size, d), with whole groups of blocks."""
  missing = -array.shape[1] % (size * max(group, 1))
  array = jnp.pad(array, ((0, 0), (0, missing), (0, 0)), constant_values=fill)
  return array.reshape(len(array), -1, size, array.shape[-1])


def gather_blocks(blocks, chosen):
  """The keys or values of the chosen blocks, side by side."""
  taken = blocks.at[chosen].get(mode='clip')
  return taken.reshape(len(chosen), -1, blocks.shape[-1])


def add_blocks(total, chosen, parts):
  """Adds the parts (a, d, k · columns) to the blocks they belong to."""
  parts = parts.reshape(*parts.shape[:2], chosen.shape[1], -1)
  return total.at[chosen].add(jnp.swapaxes(parts, 1, 2), mode='drop')


def product(plan, letters, left, right):
  """A batched matrix product that accumulates in float32."""
  return jnp.einsum(
    letters,
    left,
    right,
    precision=plan.precision,
    preferred_element_type=jnp.float32,
  )
