"""NEXUS in the batch: regions look at a few chosen regions of other images.

Attributes:
  SparseContext: the stage, in place of BCP.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msba_jax.layers.attention import attention_weights, weighted_sum
from msba_jax.layers.block_choice import block_topk
from msba_jax.models.bcp import ContextKeys, context_keys
from msba_jax.models.blocks import (
  FeedForward,
  KeyProjection,
  small_init,
  split_heads,
)
from msba_jax.models.context import AnyContext

__all__ = ['SparseContext']


class SparseContext(nn.Module):
  r"""Pre-norm attention of blocks of regions over the blocks they choose.

  Regions stand in blocks of neighbours. At every level, with parameters shared
  over levels, block i of image n scores block j of image m by the product of
  the mean query and the mean key, of all heads together,

      s[ni,mj] = q̄[ni]·k̄[mj]/√d + bias[n,m]

  and chooses the best of its own image, where there is no bias, and the best of
  the other images that it may look at. Its regions attend to the regions of
  both jointly, the bias added to the scores of the others, and

      y = u + g · W(message),    g = σ(MLP([u; message]))
      y = y + FFN(norm(y))

  An image that may look at no other keeps its regions exactly. Only the chosen
  blocks are gathered and computed; the scores of blocks are all that grows with
  the square of the batch. The choice has no gradient: the bias learns from the
  attention to what was chosen.

  Attributes:
    num_heads: number of heads.
    own: blocks of its own image that a block chooses.
    foreign: blocks of other images that a block chooses; with fewer, of either
      kind, it takes all.
    block: regions of a block.
    ratio: width of the feed-forward over that of a region.
    keys: makes the module of the keys; None is a plain projection.

  Source: MoBA: Mixture of Block Attention for Long-Context LLMs (2025), arXiv
  2502.13189, for the choice; over the regions of a batch it is ours.
  """

  num_heads: int = 4
  own: int = 4
  foreign: int = 4
  block: int = 1
  ratio: int = 4
  keys: KeyProjection | None = None

  @nn.compact
  def __call__(
    self, regions: Float[Array, 'l n r d'], context: AnyContext
  ) -> tuple[Float[Array, 'l n r d'], dict[str, Array]]:
    """Lets regions look at a context.

    Args:
      regions: of the asking images.
      context: whom they may look at.

    Returns:
      Regions of the same shape, and, for a context of m images:

      - `attention` (l, r, h, n, m): what a region pays to other images;
      - `own` (l, r, h, n): what it pays to its own; both sum to one;
      - `blocks` (l, n, i, foreign): chosen blocks of other images, best first,
        as image · (blocks of an image) + block; −1 for none;
      - `own_blocks` (l, n, i, own): chosen blocks of the image itself.

    Raises:
      ValueError: blocks do not divide the regions, or a number is not positive.
    """
    levels, n, r, features = regions.shape
    self._check(r)
    keys_of = context_keys(context, n)
    if keys_of is None:
      return regions, {}
    norm = nn.LayerNorm(name='norm')
    ask, answer, read = self._projections(features)

    def blocks(projected: Array) -> Array:
      """(l, m, r, d) to (l, m, i, t, d)."""
      lead, width = projected.shape[:2], projected.shape[-1]
      return projected.reshape(*lead, r // self.block, self.block, width)

    def answers(inputs: Array) -> Array:
      """Keys and values side by side."""
      return blocks(jnp.concatenate([answer(inputs), read(inputs)], axis=-1))

    inputs = norm(regions)
    queries, of_own = blocks(ask(inputs)), answers(inputs)
    parts = [of_own] if keys_of.asks else []
    if keys_of.foreign is not None:
      parts.append(answers(norm(keys_of.foreign.astype(regions.dtype))))
    of_all = jnp.concatenate(parts, axis=1)
    others = _others(keys_of, n)
    own = _best_own(queries, of_own[..., :features], self.own)
    chosen = _best_foreign(
      queries, of_all[..., :features], others, keys_of.bias, self.foreign
    )
    image = chosen // (r // self.block)  # stays −1 where there is none
    as_one = (levels, of_all.shape[1] * of_all.shape[2], *of_all.shape[3:])
    tokens = jnp.concatenate(
      [
        jax.vmap(jax.vmap(_gathered))(of_own, own),
        jax.vmap(_gathered)(of_all.reshape(as_one), chosen),
      ],
      axis=-3,
    )
    there = jnp.concatenate([jnp.ones(own.shape, bool), chosen >= 0], axis=-1)
    bias = None
    if keys_of.bias is not None:
      added = _bias_of(keys_of.bias, image)
      bias = self._of_tokens(
        jnp.concatenate([jnp.zeros(own.shape), added], axis=-1)
      )
    key, value = (
      split_heads(x.reshape(*x.shape[:3], -1, features), self.num_heads)
      for x in jnp.split(tokens, 2, axis=-1)
    )
    weights = attention_weights(
      split_heads(queries, self.num_heads),
      key,
      mask=self._of_tokens(there),
      bias=bias,
    )
    message = weighted_sum(weights, value).reshape(regions.shape)
    looks = jnp.any(others, axis=-1)[None, :, None, None]
    change = self._change(regions, message)
    updated = regions + jnp.where(looks, change, 0)
    paid = jnp.sum(
      weights.reshape(*weights.shape[:-1], -1, self.block), axis=-1
    )
    attention, to_own = _by_image(paid, image, others.shape[-1])
    return updated, {
      'attention': attention,
      'own': to_own,
      'blocks': _filled(chosen, self.foreign),
      'own_blocks': _filled(own, self.own),
    }

  def _check(self, r: int) -> None:
    own, foreign, block = self.own, self.foreign, self.block
    if min(own, foreign, block) < 1:
      raise ValueError(f'{own=}, {foreign=} and {block=} must be at least 1')
    if r % block:
      raise ValueError(f'{block=} must divide the {r} regions of an image')

  def _projections(self, features: int) -> tuple[nn.Module, ...]:
    """Of queries, keys and values; they are called more than once."""
    if self.keys is None:
      # A bias of all keys would cancel in the softmax.
      answer = nn.Dense(features, use_bias=False, name='keys')
    else:
      answer = self.keys(features, grid=None, prefix=0, name='keys')
    return (
      nn.Dense(features, name='queries'),
      answer,
      nn.Dense(features, name='values'),
    )

  def _of_tokens(self, by_block: Array) -> Array:
    """(l, n, i, k) to (l, n, i, 1, 1, k · t): all heads and tokens."""
    return jnp.repeat(by_block, self.block, axis=-1)[..., None, None, :]

  def _change(self, regions: Array, message: Array) -> Array:
    """What the message, and the feed-forward behind it, add to regions."""
    features = regions.shape[-1]
    gate = FeedForward(features // 2, features, name='gate')
    out = nn.Dense(features, use_bias=False, kernel_init=small_init, name='out')
    norm = nn.LayerNorm(name='norm_feed_forward')
    feed_forward = FeedForward(
      self.ratio * features, outer_init=small_init, name='feed_forward'
    )
    opened = gate(jnp.concatenate([regions, message], axis=-1))
    told = jax.nn.sigmoid(opened) * out(message)
    return told + feed_forward(norm(regions + told))


def _others(keys_of: ContextKeys, n: int) -> Bool[Array, 'n m']:
  """Which images of the context each may look at, itself not among them."""
  mask = jnp.broadcast_to(keys_of.mask, (n, keys_of.mask.shape[-1]))
  if not keys_of.asks:
    return mask
  return mask & ~jnp.eye(*mask.shape, dtype=bool)


def _best_own(
  queries: Float[Array, 'l n i t d'], keys: Float[Array, 'l n i t d'], keep: int
) -> Int[Array, 'l n i k']:
  """The best blocks of the image itself."""
  count, block = queries.shape[2:4]
  # One head as wide as a region: the heads choose together.
  asking, answering = (
    x.reshape(*x.shape[:2], count * block, 1, -1) for x in (queries, keys)
  )
  best = block_topk(asking, answering, block=block, keep=min(keep, count))
  return best[:, :, 0]


def _best_foreign(
  queries: Float[Array, 'l n i t d'],
  keys: Float[Array, 'l m j t d'],
  others: Bool[Array, 'n m'],
  bias: Array | None,
  keep: int,
) -> Int[Array, 'l n i k']:
  """The best blocks of the other images, −1 where there are too few."""
  asking, answering = (
    jnp.mean(jax.lax.stop_gradient(x), axis=-2, dtype=jnp.float32)
    for x in (queries, keys)
  )
  scores = jnp.einsum('lnid,lmjd->lnimj', asking, answering)
  scores = scores / math.sqrt(queries.shape[-1])
  if bias is not None:
    bias = jax.lax.stop_gradient(_of_levels(bias))
    scores = scores + bias[:, :, None, :, None]
  scores = jnp.where(others[None, :, None, :, None], scores, -jnp.inf)
  scores = scores.reshape(*scores.shape[:3], keys.shape[1] * keys.shape[2])
  best, indices = jax.lax.top_k(scores, min(keep, scores.shape[-1]))
  return jnp.where(best > -jnp.inf, indices, -1)


def _gathered(
  blocks: Float[Array, 'j t f'], chosen: Int[Array, '*b k']
) -> Float[Array, '*b k t f']:
  """The blocks that are chosen; what is −1 reads the first, to be masked."""
  return blocks.at[chosen].get(mode='clip')


def _of_levels(bias: Array) -> Array:
  """(n, m) or (l, n, m) to (1 or l, n, m)."""
  return bias.reshape(-1, *bias.shape[-2:])


def _bias_of(bias: Array, image: Int[Array, 'l n i k']) -> Array:
  """The bias (l, n, i, k) towards the images of the chosen blocks."""
  bias = _of_levels(bias)[:, :, None]
  shape = (*image.shape[:3], bias.shape[-1])
  return jnp.take_along_axis(
    jnp.broadcast_to(bias, shape), jnp.maximum(image, 0), axis=-1
  )


def _by_image(
  paid: Float[Array, 'l n i h t k'], image: Int[Array, 'l n i j'], count: int
) -> tuple[Float[Array, 'l r h n m'], Float[Array, 'l r h n']]:
  """What regions pay to each of `count` other images, and to their own.

  The last of the chosen blocks are of these images; −1 is none of them.
  """
  levels, n, blocks, num_heads, block = paid.shape[:5]
  own, foreign = jnp.split(paid, [paid.shape[-1] - image.shape[-1]], axis=-1)
  attention = jnp.einsum(
    'lnihtk,lnikm->lithnm',
    foreign,
    jax.nn.one_hot(image, count),
    precision=jax.lax.Precision.HIGHEST,
  )
  to_own = jnp.einsum('lnihtk->lithn', own)
  return (
    attention.reshape(levels, blocks * block, num_heads, n, count),
    to_own.reshape(levels, blocks * block, num_heads, n),
  )


def _filled(chosen: Array, size: int) -> Array:
  """Choices of this length, −1 behind."""
  width = [(0, 0)] * (chosen.ndim - 1) + [(0, size - chosen.shape[-1])]
  return jnp.pad(chosen, width, constant_values=-1)
