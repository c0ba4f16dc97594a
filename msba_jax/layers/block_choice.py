"""Which blocks of keys a block of queries reads: choices, as indices.

Attributes:
  block_topk: the blocks whose mean keys answer the mean queries best.
  block_mask: the choice as a mask of blocks.
  kept_share: the share of all pairs of blocks that is kept.
  block_means: the mean of every block.
  block_sizes: tokens of a block of queries and of one of keys.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = [
  'block_mask',
  'block_means',
  'block_sizes',
  'block_topk',
  'kept_share',
]


def block_topk(
  queries: Float[Array, '*b n h d'],
  keys: Float[Array, '*b m h d'],
  *,
  block: int | tuple[int, int],
  keep: int,
  mask: Bool[Array, '...'] | None = None,
) -> Int[Array, '*b h i k']:
  r"""The blocks of keys with the largest product of means, for every block.

  A block of queries and a block of keys score q̄·k̄, the product of the means
  over their tokens; the `keep` best blocks of keys are chosen for each head.

  Args:
    queries: what asks, in blocks of neighbours on the axis n.
    keys: what answers, in blocks on the axis m.
    block: tokens of a block of queries and of keys, or one number for both; the
      last block may be smaller.
    keep: blocks of keys for each block of queries.
    mask: broadcasts to (*b, h, blocks of queries, blocks of keys); True may be
      chosen.

  Returns:
    Indices of blocks, best first; −1 where the mask leaves too few.

  Raises:
    ValueError: the shapes do not fit together, or there are fewer blocks than
      are to be kept.
    TypeError: the mask is not Boolean.

  Example:
    >>> tokens = jnp.array([1.0, 1.0, 2.0, 2.0, -3.0, -3.0]).reshape(6, 1, 1)
    >>> block_topk(tokens, tokens, block=2, keep=2).tolist()
    [[[1, 0], [1, 0], [2, 0]]]

  Source: MoBA: Mixture of Block Attention for Long-Context LLMs (2025), arXiv
  2502.13189.
  """
  rows, columns = block_sizes(block)
  asking = block_means(queries, rows)
  answering = block_means(keys, columns)
  scores = jnp.einsum(
    '...ihd,...jhd->...hij',
    asking,
    answering,
    preferred_element_type=jnp.float32,
  )
  if not 1 <= keep <= scores.shape[-1]:
    raise ValueError(
      f'{keep=} must be between 1 and the {scores.shape[-1]} blocks of keys'
    )
  if mask is not None:
    if mask.dtype != jnp.bool_:
      raise TypeError(f'mask must be Boolean, True takes part: {mask.dtype=}')
    scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, -jnp.inf)
  best, indices = jax.lax.top_k(jax.lax.stop_gradient(scores), keep)
  return jnp.where(best > -jnp.inf, indices, -1)


def block_mask(
  block_indices: Int[Array, '*b i k'], count: int
) -> Bool[Array, '*b i {count}']:
  """The choice as a mask: True where block i names block j.

  Args:
    block_indices: as `attend_blocks` takes them.
    count: blocks of keys.

  Returns:
    The mask of blocks.

  Example:
    >>> block_mask(jnp.array([[1, -1], [2, 0]]), 3).tolist()
    [[False, True, False], [True, False, True]]
  """
  named = block_indices[..., None] == jnp.arange(count).reshape(
    (1,) * block_indices.ndim + (count,)
  )
  return jnp.any(named, axis=-2)


def kept_share(
  block_indices: Int[Array, '*b i k'], count: int
) -> Float[Array, '*b']:
  """The share of all pairs of blocks that the choice keeps.

  Args:
    block_indices: as `attend_blocks` takes them.
    count: blocks of keys.

  Returns:
    A number between zero and one for every leading index.

  Example:
    >>> float(kept_share(jnp.array([[1, -1], [2, 0]]), 3))
    0.5
  """
  return jnp.mean(block_mask(block_indices, count), axis=(-2, -1))


def block_means(tokens: Array, size: int) -> Array:
  """Means over blocks of the axis third from the end, float32."""
  length = tokens.shape[-3]
  blocks = -(-length // size)
  padding = [(0, 0)] * tokens.ndim
  padding[-3] = (0, blocks * size - length)
  sums = jnp.sum(
    jnp.pad(tokens, padding).reshape(
      *tokens.shape[:-3], blocks, size, *tokens.shape[-2:]
    ),
    axis=-3,
    dtype=jnp.float32,
  )
  there = jnp.minimum(size, length - size * jnp.arange(blocks))
  return sums / there[:, None, None].astype(jnp.float32).reshape(
    (1,) * (sums.ndim - 3) + (blocks, 1, 1)
  )


def block_sizes(block: int | tuple[int, int]) -> tuple[int, int]:
  """Tokens of a block of queries and of one of keys.

  Raises:
    ValueError: there are none.
  """
  rows, columns = (block, block) if isinstance(block, int) else block
  if rows < 1 or columns < 1:
    raise ValueError(f'{block=} must be at least 1')
  return rows, columns
