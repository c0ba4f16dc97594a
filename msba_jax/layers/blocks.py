"""Groups of blocks of queries, and the blocks of keys that they read.

Attributes:
  Chosen: the blocks of keys that blocks of queries read.
  chosen_blocks: the same from indices.
  in_blocks: an axis of tokens as blocks of tokens.
  over_slices: a function of rows of blocks, on all slices.
  order_rows, take_rows: rows by how many blocks they name, a group at a time.
  block_scores: the scores of one step.
  key_bias: what is added to the scores of every key.
  run_steps: as many steps as a group needs.
  gather_blocks, add_blocks: to and from the chosen blocks.
  product: a batched matrix product that accumulates in float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from msba_jax.layers.block_plan import BlockPlan
from msba_jax.layers.chunks import map_heads, mask_tiles
from msba_jax.layers.varying import varying_like

__all__ = [
  'Chosen',
  'add_blocks',
  'block_scores',
  'chosen_blocks',
  'gather_blocks',
  'in_blocks',
  'key_bias',
  'order_rows',
  'over_slices',
  'product',
  'run_steps',
  'take_rows',
]


class Chosen(NamedTuple):
  """The blocks of keys that blocks of queries read.

  Attributes:
    places: (a, k), of the blocks; of any block where nothing is named.
    tokens: (a, k), how many keys of a block take part, the first ones; 0 where
      nothing is named. Those that take part stand first.
    bias: (a, k · columns), added to the scores of the keys, −∞ for those that
      take no part; None where nothing else is added.
  """

  places: Array
  tokens: Array
  bias: Array | None

  def slots(self, first: int | Array, width: int) -> 'Chosen':
    """Some of them."""
    places, tokens, bias = self
    slots = places.shape[1]

    def cut(array):
      unit = array.shape[1] // slots
      return jax.lax.dynamic_slice_in_dim(
        array, first * unit, width * unit, axis=1
      )

    return Chosen(cut(places), cut(tokens), None if bias is None else cut(bias))

  def fullest(self) -> Array:
    """How many blocks a row names at most."""
    return jnp.max(jnp.sum(self.tokens > 0, axis=1))


def chosen_blocks(
  plan: BlockPlan,
  slices: int,
  indices: Array,
  m: int,
  bias: Array | None = None,
) -> Chosen:
  """What the rows of every head read, each block once and ascending.

  Args:
    plan: of these shapes.
    slices: heads whose blocks of keys make one list, as for `over_slices`.
    indices: (c, i, k), blocks of keys behind the leading ones; what is no such
      block stands for nothing.
    m: number of keys.
    bias: (c, i, leading · columns), of the keys of the leading blocks.

  Returns:
    Arrays (g, i, …), with places in the list of blocks that a slice is in.
  """
  count = -(-m // plan.columns)
  there = (indices >= 0) & (indices < count - plan.leading)
  names = jnp.where(there, indices + plan.leading, count)
  names = jnp.sort(names, axis=-1)
  again = jnp.pad(names[..., 1:] == names[..., :-1], ((0, 0), (0, 0), (1, 0)))
  names = jnp.sort(jnp.where(again, count, names), axis=-1)
  front = jnp.arange(plan.leading, dtype=names.dtype)
  front = jnp.broadcast_to(front, (*names.shape[:2], plan.leading))
  names = jnp.concatenate([front, names], axis=-1)
  # The last step must find whole slots: a slice that reached over the end would
  # be moved back, over blocks that were there before.
  padding = (0, 0), (0, 0), (0, -names.shape[-1] % plan.slots)
  names = jnp.pad(names, padding, constant_values=count)
  tokens = jnp.clip(m - names * plan.columns, 0, plan.columns)
  of = np.asarray(plan.indices_of)
  first = count * (np.arange(len(of)) % slices)
  places = jnp.minimum(names, count - 1)[of] + first[:, None, None]
  chosen = Chosen(places, tokens[of], None)
  if bias is None:
    return chosen
  rest = _taking_part(plan.columns, tokens)[..., bias.shape[-1] :]
  bias = jnp.concatenate([bias, rest], axis=-1)[of]
  return chosen._replace(bias=bias)


def in_blocks(array, size):
  """(g, n, d) as (g, blocks, size, d), with whole blocks."""
  missing = -array.shape[1] % size
  if missing:
    array = jnp.pad(array, ((0, 0), (0, missing), (0, 0)))
  return array.reshape(len(array), -1, size, array.shape[-1])


def over_slices(plan, slices, run, *arrays):
  """`run` of arrays with rows or blocks on the first axis, list by list.

  So many slices, which are heads, make one list.
  """
  heads = len(plan.indices_of)
  lists = heads // slices
  arrays = jax.tree.map(lambda x: x.reshape(lists, -1, *x.shape[2:]), arrays)
  found = map_heads(plan, run, arrays)
  return jax.tree.map(lambda x: x.reshape(heads, -1, *x.shape[2:]), found)


def order_rows(group, chosen):
  """Rows of blocks, a group a line, fullest last; and where each row went.

  What fills up the last group is a row that is not there.
  """
  order = jnp.argsort(jnp.sum(chosen.tokens > 0, axis=1))
  back, rows = jnp.argsort(order), len(order)
  group = group or rows
  order = jnp.pad(order, (0, -rows % group), constant_values=rows)
  return order.reshape(-1, group), back


def take_rows(arrays, order):
  """A group of rows of every array; a row that is not there is zero."""

  def take(array):
    if len(array) % len(order) == 0:
      return array.at[order].get(mode='clip')
    return array.at[order].get(mode='fill', fill_value=0)

  return jax.tree.map(take, arrays)


def key_bias(plan, chosen):
  """What is added to the scores of every key, (a, 1, k · columns)."""
  if chosen.bias is not None:
    return chosen.bias[:, None]
  return _taking_part(plan.columns, chosen.tokens)[:, None]


def _taking_part(columns, tokens):
  """Zero for the first tokens of every block, and −∞ for the others."""
  token = np.arange(columns).reshape((1,) * tokens.ndim + (columns,))
  bias = jnp.where(token < tokens[..., None], 0.0, -jnp.inf)
  return bias.reshape(*tokens.shape[:-1], -1)


def block_scores(plan, m, asking, key, chosen):
  """Scores of a group against a few chosen blocks each."""
  scores = product(plan, 'abd,akd->abk', asking, gather_blocks(key, chosen))
  scores = scores * plan.scale
  if m % plan.columns or chosen.bias is not None:
    return scores + key_bias(plan, chosen)
  return mask_tiles(scores, (chosen.tokens > 0)[:, None])


def run_steps(plan, chosen, step, start):
  """Takes what a group names, `slots` blocks at a time.

  `step(chosen, result)` gives the next result. The last step is as wide as the
  fullest row of the group needs, rounded up to a quarter of the others; where
  heads run together, a branch would cost as much as all of them do, and all
  steps are equal.
  """

  def visit(first, width, result):
    return step(chosen.slots(first, width), result)

  def whole_step(j, result):
    return visit(j * plan.slots, plan.slots, result)

  start = jax.tree.map(lambda x: varying_like(x, chosen.places), start)
  if plan.together and chosen.places.shape[1] == plan.slots:
    return step(chosen, start)
  most = chosen.fullest()
  if plan.together:
    return jax.lax.fori_loop(0, -(-most // plan.slots), whole_step, start)
  whole = most // plan.slots
  result = jax.lax.fori_loop(0, whole, whole_step, start)
  quarter = -(-plan.slots // 4)
  widths = [*range(quarter, plan.slots, quarter), plan.slots]
  last = [functools.partial(visit, whole * plan.slots, x) for x in widths]
  rest = most - whole * plan.slots
  return jax.lax.switch(-(-rest // quarter), [lambda x: x, *last], result)


def gather_blocks(blocks, chosen):
  """The keys or values of the chosen blocks, side by side."""
  taken = blocks.at[chosen.places].get(mode='clip')
  return taken.reshape(len(taken), -1, blocks.shape[-1])


def add_blocks(total, chosen, parts):
  """Adds the parts (a, d, k · columns) to the blocks they belong to."""
  parts = parts.reshape(*parts.shape[:2], chosen.places.shape[1], -1)
  places = jnp.where(chosen.tokens > 0, chosen.places, len(total))
  return total.at[places].add(jnp.swapaxes(parts, 1, 2), mode='drop')


def product(plan, letters, left, right):
  """A batched matrix product that accumulates in float32."""
  return jnp.einsum(
    letters,
    left,
    right,
    precision=plan.precision,
    preferred_element_type=jnp.float32,
  )
