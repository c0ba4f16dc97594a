r"""How attention is cut into chunks: the static facts and the cutting itself.

Attributes:
  Plan: the static facts of a call of `chunked_attention`.
  plan_chunks: a plan from the shapes of a call.
  heads_first: heads and leading axes in front, as one axis.
  heads_last: the inverse.
  laid_out: plan and arrays from those of `attend`.
  sharing: which of the given masks or biases every head has.
  scorer: the scores of one chunk.
  product: a matrix product that accumulates in float32.
  pad_to_chunks, take_chunk, take_block: whole chunks, and one of them.
  sum_shared, join_blocks: the gradient of a bias from that of its blocks.
  shared_slices, map_heads, scan_chunks: loops over heads and chunks.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from msba_jax.layers.varying import varying_like


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static facts of a call of `chunked_attention`.

  Attributes:
    scale: factor of the products.
    precision: of the matrix products.
    rows: queries of a chunk.
    columns: keys of a chunk.
    tile: queries and keys that share one entry of the mask.
    mask_of: the mask of every head, an index into the leading axis of the mask.
    bias_of: the bias of every head likewise.
    together: whether all heads run at once.
  """

  scale: float
  precision: jax.lax.PrecisionLike
  rows: int
  columns: int
  tile: tuple[int, int] = (1, 1)
  mask_of: tuple[int, ...] = ()
  bias_of: tuple[int, ...] = ()
  together: bool = False


def plan_chunks(
  n: int,
  m: int,
  *,
  scale: float,
  chunk: int | tuple[int, int] | None = None,
  precision: jax.lax.PrecisionLike = None,
  tile: tuple[int, int] = (1, 1),
  mask_of: tuple[int, ...] = (),
  bias_of: tuple[int, ...] = (),
) -> Plan:
  """Chunks of nearly equal size, none larger than asked for.

  Args:
    n: queries.
    m: keys.
    scale: factor of the products.
    chunk: largest number of queries and of keys of a chunk, or one number for
      both; None is what suits the platform.
    precision: of the matrix products.
    tile: queries and keys that share one entry of the mask; a chunk holds
      whole tiles, so it may be larger than asked for if the tile is.
    mask_of: the mask of every head.
    bias_of: the bias of every head.

  Returns:
    The plan.

  Raises:
    ValueError: the size of a chunk is below one.
  """
  rows, columns = (
    _even(size, most, unit)
    for size, most, unit in zip((n, m), _sizes(chunk, m), tile, strict=True)
  )
  # Heads that share a bias must add their gradients of it one by one.
  alone = len(set(bias_of)) == len(bias_of)
  return Plan(
    scale=scale,
    precision=precision,
    rows=rows,
    columns=columns,
    tile=tile,
    mask_of=mask_of,
    bias_of=bias_of,
    together=jax.default_backend() != 'cpu' and alone,
  )


def heads_first(array: Array) -> Array:
  """(*b, n, h, d) as (b · h, n, d)."""
  array = jnp.swapaxes(array, -3, -2)
  return array.reshape(math.prod(array.shape[:-2]), *array.shape[-2:])


def heads_last(array: Array, lead: tuple[int, ...], heads: int) -> Array:
  """(b · h, n, …) as (*b, n, h, …), the inverse of `heads_first`."""
  array = array.reshape(*lead, heads, *array.shape[1:])
  return jnp.moveaxis(array, len(lead), len(lead) + 1)


def sharing(
  array: Array, lead: tuple[int, ...]
) -> tuple[Array, tuple[int, ...]]:
  """A mask or bias with one leading axis, and which slice every head has.

  Args:
    array: broadcasts to (*lead, n, m).
    lead: the leading axes of the scores: *b, h.

  Returns:
    The array as (slices, n or 1, m or 1), and one index into it a head.
  """
  array = array.reshape((1,) * (2 - array.ndim) + array.shape)
  own = array.shape[:-2]
  slices = np.arange(math.prod(own)).reshape(own)
  of = tuple(int(i) for i in np.broadcast_to(slices, lead).ravel())
  return array.reshape(slices.size, *array.shape[-2:]), of


def laid_out(
  queries, keys, values, mask, bias, scale, precision, chunk, tile=(1, 1)
):
  """The plan and the arrays of `chunked_attention` from those of `attend`."""
  lead = (*queries.shape[:-3], queries.shape[-2])
  mask, mask_of = (None, ()) if mask is None else sharing(mask, lead)
  bias, bias_of = (None, ()) if bias is None else sharing(bias, lead)
  dtype = jnp.promote_types(queries.dtype, keys.dtype)
  plan = plan_chunks(
    queries.shape[-3],
    keys.shape[-3],
    scale=scale,
    precision=precision,
    chunk=chunk,
    tile=tile,
    mask_of=mask_of,
    bias_of=bias_of,
  )
  return plan, (
    heads_first(queries.astype(dtype)),
    heads_first(keys.astype(dtype)),
    heads_first(values),
    mask,
    bias,
  )


def scorer(plan, m, mask, mask_of, bias, bias_of):
  """The function that gives the scores of chunk i of rows, j of columns."""

  def score(asking, answering, i, j):
    scores = product(plan, asking, answering, 1, 1) * plan.scale
    if bias is not None:
      added = take_block(bias, bias_of, i, j, plan.rows, plan.columns)
      scores = scores + added.astype(jnp.float32)
    if mask is not None:
      height, width = plan.rows // plan.tile[0], plan.columns // plan.tile[1]
      allowed = take_block(mask, mask_of, i, j, height, width)
      scores = mask_tiles(scores, allowed)
    if m % plan.columns:
      there = j * plan.columns + jnp.arange(plan.columns) < m
      scores = mask_tiles(scores, there[None])
    return scores

  return score


def product(plan, left, right, left_axis, right_axis):
  """A matrix product that accumulates in float32."""
  return jax.lax.dot_general(
    left,
    right,
    (((left_axis,), (right_axis,)), ((), ())),
    precision=plan.precision,
    preferred_element_type=jnp.float32,
  )


def _sizes(chunk, m):
  """Queries and keys of a chunk: as given, or what suits the platform.

  On CPU the scores of a chunk stay in the last level of the cache; elsewhere
  chunks are large, since all heads share a step.
  """
  if chunk is None:
    if jax.default_backend() != 'cpu':
      return 1024, 2048
    return (512, 4096) if m > 1024 else (1024, 1024)
  rows, columns = (chunk, chunk) if isinstance(chunk, int) else chunk
  if rows < 1 or columns < 1:
    raise ValueError(f'{chunk=} must be at least 1')
  return rows, columns


def _even(size: int, most: int, unit: int) -> int:
  """Size of equal chunks of whole units, as few as `most` allows."""
  units = -(-size // unit)
  chunks = max(1, -(-units // max(1, most // unit)))
  return max(1, -(-units // chunks)) * unit


def pad_to_chunks(plan, queries, keys, values, mask, bias):
  """The arguments with whole chunks of queries and keys."""
  rows = -queries.shape[1] % plan.rows
  columns = -keys.shape[1] % plan.columns

  def pad(array, first, second):
    padding = ((0, 0), (0, first), (0, second))
    return jnp.pad(array, padding) if first or second else array

  if mask is not None:
    mask = pad(mask, *_missing(mask, rows, columns, plan.tile))
  if bias is not None:
    bias = pad(bias, *_missing(bias, rows, columns, (1, 1)))
  queries = pad(queries, rows, 0)
  return queries, pad(keys, columns, 0), pad(values, columns, 0), mask, bias


def _missing(array, rows, columns, tile):
  return (
    rows // tile[0] if array.shape[1] > 1 else 0,
    columns // tile[1] if array.shape[2] > 1 else 0,
  )


def take_chunk(array, i, size):
  """Rows i · size to (i + 1) · size."""
  return jax.lax.dynamic_slice_in_dim(array, i * size, size)


def take_block(array, of, i, j, height, width):
  """Block (i, j) of slice `of`; an axis of size one belongs to all blocks."""
  height, i = (1, 0) if array.shape[1] == 1 else (height, i * height)
  width, j = (1, 0) if array.shape[2] == 1 else (width, j * width)
  return jax.lax.dynamic_slice(array, (of, i, j), (1, height, width))[0]


def mask_tiles(scores, allowed):
  """Scores (…, rows, columns), −∞ where the mask (…, i, j) of tiles is False.

  A tile is as large as the scores are larger than the mask. The axes are split
  rather than the mask repeated: the innermost loop then runs over a tile.
  """
  *lead, rows, columns = scores.shape
  i, j = allowed.shape[-2:]
  tiles = scores.reshape(*lead, i, rows // i, j, columns // j)
  tiles = jnp.where(allowed[..., :, None, :, None], tiles, -jnp.inf)
  return tiles.reshape(scores.shape)


def sum_shared(steps, bias):
  """The sum over the axes that the bias does not have; None without one."""
  if bias is None:
    return None
  axes = tuple(axis for axis in (0, 1) if bias.shape[axis + 1] == 1)
  return jnp.sum(steps, axis=axes, keepdims=True)


def join_blocks(blocks, axis, bias):
  """Stacked blocks of the bias side by side, or their sum if it has no axis."""
  if bias is None:
    return None
  if bias.shape[axis + 1] == 1:
    return jnp.sum(blocks, axis=0)
  blocks = jnp.moveaxis(blocks, 0, axis)
  shape = list(blocks.shape)
  shape[axis : axis + 2] = [-1]
  return blocks.reshape(shape)


def shared_slices(plan: Plan, heads: int) -> tuple[Array, Array]:
  """Which mask and which bias every head has."""
  first = (0,) * heads
  return (
    jnp.asarray(plan.mask_of or first, jnp.int32),
    jnp.asarray(plan.bias_of or first, jnp.int32),
  )


def map_heads(plan, head, arrays):
  """The function on every head: at once, or one after the other."""
  if plan.together:
    return jax.vmap(head)(*arrays)
  return jax.lax.map(lambda x: head(*x), arrays)


def scan_chunks(body, start, length, like):
  """A scan over 0 … length − 1; what it carries varies as `like` does."""
  if length == 1:
    carry, result = body(start, 0)
    return carry, jax.tree.map(lambda x: x[None], result)
  start = jax.tree.map(lambda x: varying_like(x, like), start)
  return jax.lax.scan(body, start, jnp.arange(length))
