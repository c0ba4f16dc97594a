r"""Attention that is exact in chosen blocks and reads the others by their mean.

Leaving out most of the keys is right where attention has them for nothing. If
it is spread widely, much is lost with them, whichever are chosen. Here a block
that is not chosen stays, as its mean key and its mean value with the weight of
as many tokens: softmax attention over all keys whose scores are averaged inside
those blocks.

Attributes:
  attend_blocks_and_means: such attention.
  weights_by_block: dense attention weights, and what the means would have.
  BlockWeights: both, and what is lost by the means.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from msba_jax.layers.attention import attention_scores
from msba_jax.layers.block_choice import block_mask, block_means, block_sizes
from msba_jax.layers.block_sparse import sparse_attention
from msba_jax.layers.chunks import heads_last
from msba_jax.layers.sparse import laid_out_blocks

__all__ = ['BlockWeights', 'attend_blocks_and_means', 'weights_by_block']

# Of the distance of a score from the mean of its block: below it the loss is
# summed as a series is, since a weight minus that of the mean would cancel.
NEAR = 0.5


class BlockWeights(NamedTuple):
  """Dense attention weights of a few queries, by blocks of keys.

  Attributes:
    weights: a, the softmax over all keys.
    means: c, the weight that a token of a block has if all its keys are the
      mean of them, over the same normaliser.
    lost: Σ_t a − t · c, what attention loses, of all weight, if a block is left
      to its mean; never negative.
  """

  weights: Float[Array, '*b h i j t']
  means: Float[Array, '*b h i j']
  lost: Float[Array, '*b h i j']


def attend_blocks_and_means(
  queries: Float[Array, '*b n h d'],
  keys: Float[Array, '*b m h d'],
  values: Float[Array, '*b m h f'],
  block_indices: Int[Array, '...'],
  *,
  block: int | tuple[int, int],
  parts: int = 1,
  scale: float | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, '*b n h f']:
  r"""`attend_blocks` in which the blocks that are not named keep their means.

      p[n,m] ∝ exp(scale · q[n]·k[m])       where m's block is named
      p[n,m] ∝ exp(scale · q[n]·k̄[part])    elsewhere
      o[n]   = Σ_m p[n,m] v[m]

  With Z and Z_d the normalisers of these weights and of dense attention,
  KL(p‖dense) = log Z_d / Z, since the scores of a part deviate from their mean
  by zero on average; Z ≤ Z_d, since exp is convex. A mean costs as much as one
  token. First derivatives only.

  Args:
    queries: what asks, in blocks of neighbours on the axis n.
    keys: what answers, in blocks on the axis m.
    values: what is read.
    block_indices: broadcasts to (*b, h, blocks of queries, k), as for
      `attend_blocks`; a block of queries that names none reads means alone.
    block: tokens of a block of queries and of keys, or one number for both; the
      last block may be smaller.
    parts: means of a block, each of as many neighbours; divides the keys of a
      block.
    scale: factor of the products; None is 1/√d.
    precision: of the matrix products, as in `jax.lax.dot_general`.

  Returns:
    Messages in the dtype of the values.

  Raises:
    ValueError: the shapes do not fit together, or the parts do not divide a
      block.
    TypeError: the indices are not integers.

  Example:
    >>> tokens = jnp.array([0.0, 4.0, 1.0, 1.0]).reshape(4, 1, 1)
    >>> first = jnp.array([[0], [0]])
    >>> read = attend_blocks_and_means(
    ...   0 * tokens, tokens, tokens, first, block=2
    ... )
    >>> read.ravel().tolist()
    [1.5, 1.5, 1.5, 1.5]

  Source: of this project. Means of blocks beside chosen tokens are also read by
  Native Sparse Attention (2025), arXiv 2502.11089, as attention of its own.
  """
  _, columns = block_sizes(block)
  if parts < 1 or columns % parts:
    raise ValueError(f'{parts=} must divide the {columns} keys of a block')
  m, size = keys.shape[-3], columns // parts
  means = block_means(keys, size), block_means(values, size)
  count = means[0].shape[-3]
  missing = -count % columns

  def behind_means(array, means):
    padding = ((0, 0),) * (array.ndim - 3) + ((0, missing), (0, 0), (0, 0))
    means = jnp.pad(means.astype(array.dtype), padding)
    return jnp.concatenate([means, array], axis=-3)

  plan, arrays = laid_out_blocks(
    queries,
    behind_means(keys, means[0]),
    behind_means(values, means[1]),
    block_indices,
    block,
    scale,
    precision,
    leading=(count + missing) // columns,
  )
  # Every row reads the means of blocks that it does not name.
  left = ~block_mask(arrays[-1], -(-m // columns))
  left = jnp.repeat(left, parts, axis=-1)[..., :count]
  tokens = np.minimum(m - size * np.arange(count), size).astype(np.float32)
  bias = jnp.where(left, np.log(tokens).reshape(1, 1, -1), -jnp.inf)
  bias = jnp.pad(bias, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)
  messages = sparse_attention(plan, *arrays, bias).messages
  return heads_last(messages, queries.shape[:-3], queries.shape[-2])


def weights_by_block(
  queries: Float[Array, '*b i h d'],
  keys: Float[Array, '*b m h d'],
  *,
  block: int,
  scale: float | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> BlockWeights:
  r"""Dense attention weights of a few queries, and what the means would have.

  With δ_t the distance of a score from the mean of its block, a_t = c exp δ_t
  and Σ_t δ_t = 0: so what is lost is c Σ_t (exp δ_t − 1 − δ_t), which does not
  cancel where scores differ by little.

  Args:
    queries: what asks; the product i · m is held in memory.
    keys: what answers, in blocks on the axis m.
    block: tokens of a block, t; divides m.
    scale: factor of the products; None is 1/√d.
    precision: of the matrix products, as in `jax.lax.dot_general`.

  Returns:
    Weights, those of the means, and what is lost, in float32.

  Raises:
    ValueError: the block does not divide the keys, or the shapes do not fit
      together.

  Example:
    >>> keys = jnp.log(jnp.array([1.0, 4.0, 1.0, 2.0])).reshape(4, 1, 1)
    >>> found = weights_by_block(jnp.ones((1, 1, 1)), keys, block=2)
    >>> [[round(x, 3) for x in block] for block in found.weights[0, 0].tolist()]
    [[0.125, 0.5], [0.125, 0.25]]
    >>> [round(x, 3) for x in found.means[0, 0].tolist()]
    [0.25, 0.177]
  """
  m = keys.shape[-3]
  if block < 1 or m % block:
    raise ValueError(f'{block=} must divide the {m} keys')
  logits = attention_scores(queries, keys, scale=scale, precision=precision)
  logits = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  logits = logits.reshape(*logits.shape[:-1], m // block, block)
  mean = jnp.mean(logits, axis=-1, keepdims=True)
  weights, means, away = jnp.exp(logits), jnp.exp(mean), logits - mean
  near = away < NEAR
  small = jnp.where(near, away, 0)
  lost = jnp.where(
    near, means * (jnp.expm1(small) - small), weights - means * (1 + away)
  )
  return BlockWeights(weights, means.squeeze(-1), jnp.sum(lost, axis=-1))
