r"""Attention of blocks of queries over a few chosen blocks of keys each.

Which blocks a block of queries reads is data: int32 indices, so that one
compiled program serves all choices. Only the chosen blocks are gathered and
computed, forward and backward; a row of indices may hold fewer blocks than
another, and costs less then.

Attributes:
  attend_blocks: attention over the chosen blocks.
  attend_image_blocks: the same with a block an image.
  laid_out_blocks: the plan and the arrays of a call.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from msba_jax.layers.block_choice import block_mask, block_sizes, kept_share
from msba_jax.layers.block_plan import BlockPlan, plan_blocks
from msba_jax.layers.block_sparse import sparse_attention
from msba_jax.layers.chunked import attend_in_chunks
from msba_jax.layers.chunks import heads_first, heads_last, sharing

__all__ = [
  'attend_blocks',
  'attend_image_blocks',
  'laid_out_blocks',
]

# Share of kept blocks from which the dense loop with a mask of blocks is ahead
# of gathering them.
DENSE_SHARE = 0.9


def attend_blocks(
  queries: Float[Array, '*b n h d'],
  keys: Float[Array, '*b m h d'],
  values: Float[Array, '*b m h f'],
  block_indices: Int[Array, '...'],
  *,
  block: int | tuple[int, int],
  scale: float | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, '*b n h f']:
  r"""Attention of every block of queries over the blocks of keys it names.

  o[n] = softmax_m(scale · q[n]·k[m]) v[m] over the m whose block is among the
  indices of n's block. What no block names gets no gradient, and the indices
  have none. First derivatives only.

  Args:
    queries: what asks, in blocks of neighbours on the axis n.
    keys: what answers, in blocks on the axis m.
    values: what is read.
    block_indices: broadcasts to (*b, h, blocks of queries, k), the last two
      axes as they are. An index that is no block, such as −1, stands for
      nothing, and one that stands twice counts once.
    block: tokens of a block of queries and of keys, or one number for both; the
      last block may be smaller.
    scale: factor of the products; None is 1/√d.
    precision: of the matrix products, as in `jax.lax.dot_general`.

  Returns:
    Messages in the dtype of the values; zero for queries whose block names
    none.

  Raises:
    ValueError: the shapes do not fit together.
    TypeError: the indices are not integers.

  Example:
    >>> tokens = jnp.arange(4.0).reshape(4, 1, 1)
    >>> own = jnp.array([[0], [1]])
    >>> attend_blocks(0 * tokens, tokens, tokens, own, block=2).ravel().tolist()
    [0.5, 0.5, 2.5, 2.5]
  """
  plan, arrays = laid_out_blocks(
    queries, keys, values, block_indices, block, scale, precision
  )
  n, m = queries.shape[-3], keys.shape[-3]
  whole = n % plan.rows == 0 and m % plan.columns == 0
  count = -(-m // plan.columns)

  def chosen(arrays):
    messages = sparse_attention(plan, *arrays).messages
    return heads_last(messages, queries.shape[:-3], queries.shape[-2])

  if not whole or block_indices.shape[-1] < DENSE_SHARE * count:
    return chosen(arrays)

  def everything(_):
    return attend_in_chunks(
      queries,
      keys,
      values,
      mask=block_mask(block_indices, count),
      scale=plan.scale,
      precision=precision,
      tile=(plan.rows, plan.columns),
    ).messages

  # Wide rows may hold little.
  share = jnp.mean(kept_share(block_indices, count))
  return jax.lax.cond(share >= DENSE_SHARE, everything, chosen, arrays)


def attend_image_blocks(
  queries: Float[Array, 'n t h d'],
  keys: Float[Array, 'm s h d'],
  values: Float[Array, 'm s h f'],
  image_indices: Int[Array, '*h n k'],
  *,
  scale: float | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, 'n t h f']:
  r"""Every token of an image looks at all tokens of the images it names.

  The batch form of `attend_blocks`. Where a block is a region of an image,
  regions take the place of images on the first axis.

  Args:
    queries: tokens of the asking images.
    keys: tokens of the answering images.
    values: what is read from them.
    image_indices: the images that image n reads, for all heads or for each; −1
      stands for nothing.
    scale: factor of the products; None is 1/√d.
    precision: of the matrix products, as in `jax.lax.dot_general`.

  Returns:
    Messages in the dtype of the values; zero for an image that names none.

  Raises:
    ValueError: the shapes do not fit together.
    TypeError: the indices are not integers.

  Example:
    >>> tokens = jnp.arange(4.0).reshape(2, 2, 1, 1)
    >>> other = jnp.array([[1], [0]])
    >>> read = attend_image_blocks(0 * tokens, tokens, tokens, other)
    >>> read.ravel().tolist()
    [2.5, 2.5, 0.5, 0.5]
  """
  n, t = queries.shape[:2]
  messages = attend_blocks(
    queries.reshape(-1, *queries.shape[2:]),
    keys.reshape(-1, *keys.shape[2:]),
    values.reshape(-1, *values.shape[2:]),
    image_indices,
    block=(t, keys.shape[1]),
    scale=scale,
    precision=precision,
  )
  return messages.reshape(n, t, *messages.shape[1:])


def laid_out_blocks(
  queries,
  keys,
  values,
  block_indices,
  block,
  scale,
  precision,
  *,
  leading=0,
  shares=1,
) -> tuple[BlockPlan, tuple[Array, Array, Array, Array]]:
  """The plan and the arrays of `sparse_attention` from those above.

  The first `leading` blocks of keys have no index.
  """
  rows, columns = block_sizes(block)
  _check(queries, keys, values, block_indices, rows)
  lead = (*queries.shape[:-3], queries.shape[-2])
  indices, indices_of = sharing(block_indices, lead)
  count = -(-keys.shape[-3] // columns) - leading
  plan = plan_blocks(
    rows,
    columns,
    count=block_indices.shape[-2],
    keep=block_indices.shape[-1],
    scale=1 / math.sqrt(queries.shape[-1]) if scale is None else scale,
    precision=precision,
    indices_of=indices_of,
    leading=leading,
    shares=shares,
    wide=block_indices.shape[-1] >= DENSE_SHARE * count,
  )
  dtype = jnp.promote_types(queries.dtype, keys.dtype)
  return plan, (
    heads_first(queries.astype(dtype)),
    heads_first(keys.astype(dtype)),
    heads_first(values),
    indices,
  )


def _check(queries, keys, values, block_indices, rows):
  if (
    queries.ndim != keys.ndim
    or queries.shape[:-3] + queries.shape[-2:]
    != keys.shape[:-3] + keys.shape[-2:]
    or values.shape[:-1] != keys.shape[:-1]
  ):
    raise ValueError(
      'queries, keys and values do not fit together: '
      f'{queries.shape=} {keys.shape=} {values.shape=}'
    )
  if not jnp.issubdtype(block_indices.dtype, jnp.integer):
    raise TypeError(f'{block_indices.dtype=} must be an integer type')
  lead = (*queries.shape[:-3], queries.shape[-2])
  blocks = -(-queries.shape[-3] // rows)
  given = block_indices.shape[:-2]
  fits = block_indices.ndim >= 2 and len(given) <= len(lead)
  fits = fits and all(
    size in (1, goal)
    for size, goal in zip(reversed(given), reversed(lead), strict=False)
  )
  if not fits or block_indices.shape[-2] != blocks:
    raise ValueError(
      f'block_indices must broadcast to (*b, h, {blocks}, k) with b and h = '
      f'{lead}: {block_indices.shape=}'
    )
