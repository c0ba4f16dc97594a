"""Self-attention of a grid over the few regions that a row of it needs.

Attributes:
  SparseAttention: regions choose regions, and how many.
  region_side: how large a region is.
  cell_side: how large a part of it with a mean of its own is.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.layers.attention import attend
from msba_jax.layers.block_choice import block_mask, block_means
from msba_jax.layers.block_means import (
  attend_blocks_and_means,
  weights_by_block,
)
from msba_jax.layers.choice import straight_through
from msba_jax.layers.sparse import attend_blocks
from msba_jax.layers.sparsity import (
  keep_counts,
  row_statistics,
  soft_keep,
  topk_indices,
)
from msba_jax.losses.sparsity import kept_mass_loss
from msba_jax.models.blocks import (
  KeyProjection,
  queries_keys_values,
  split_heads,
)
from msba_jax.models.size_logits import SizeLogits

__all__ = ['SparseAttention', 'cell_side', 'region_side']

# With fewer regions, of which the own one is always kept, a share of them is
# hardly a choice.
LEAST_REGIONS = 9
# Of the attention of a row: what a closer look at a region gives counts as
# nothing below it.
LEAST_LOSS = 1e-4
# A token of which less remains counts as if this did: what a choice can change
# is bounded, and its slope by M is not.
LEAST_LENT = 0.1


def region_side(height: int, width: int, most: int) -> int:
  """The largest side of square regions, up to `most`, that tile a grid.

  There are at least nine, if the grid has as many tokens.
  """
  sides = (s for s in range(1, most + 1) if not (height % s or width % s))
  enough = (s for s in sides if height * width >= LEAST_REGIONS * s * s)
  return max(enough, default=1)


def cell_side(region: int) -> int:
  """The largest side up to four that tiles a region; all of it if none does.

  A cell of one token would have no other mean than itself.
  """
  return max((s for s in range(2, 5) if region % s == 0), default=region)


class SparseAttention(nn.Module):
  r"""Tokens look at the regions that their own region finds important.

  The grid is cut into square regions, and every head chooses for itself. The
  mean query of region i attends densely; P_ij is the weight that falls on
  region j, and C_ij what would fall on it if the keys of a cell, a square part
  of the region, were all their mean. Those regions are kept for which means are
  the worst stand-in, by S_ij = log(P_ij − C_ij); a small network, the same for
  all heads, reads the entropy, maximum and deviation of the row S_i and says
  which share ρ_i the row keeps, among them always its own. Tokens attend to the
  tokens of the kept regions and to the means of the cells of the others
  (`layers.attend_blocks_and_means`), and only what is kept is gathered.

  Where there is a key 'dropout', as in training, ρ_i is drawn by a Gumbel
  softmax with a straight-through gradient. What the choice is worth is measured
  at one token of every region, drawn anew in training, that attends densely
  with weights a_t, or c_t for a token that is left to the mean of its cell. The
  choice itself has no gradient, so that of this token is lent to it:

      p_t = M_ij a_t + (1 − M_ij) c_t,   m̃_i = Σ_t p_t v_t / Σ_t p_t

  of which the value is not added and the gradient by M is.

  Where regions would be single tokens, as of a grid of 3 × 3, their means would
  be themselves: such a grid attends densely, and chooses and tells nothing.

  Attributes:
    num_heads: number of heads.
    region: largest side of a region, in tokens; smaller where it would not
      tile the grid, or leave fewer than nine regions.
    ratios: candidates of ρ; a single one is not chosen.
    temperature: of the Gumbel softmax and of the mask's gradient.
    means: whether regions that are not kept are read by means. Without, they
      are left out (C = 0), and S_ij is the product of mean query and mean key
      of all heads together, q̄_i·k̄_j/√d, which then read the same regions.
    dense: attends to everything with the same parameters, and tells how far the
      choice would be from it.
    qkv_features: width of all queries, keys and values together; None is that
      of the tokens.
    keys: makes the module of the keys; None is a plain projection.

  Source: BiFormer: Vision Transformer with Bi-Level Routing Attention (2023),
  arXiv 2303.08810, for regions that choose regions; MoBA (2025), arXiv
  2502.13189. What a mean loses, and the network, are of this project.
  """

  num_heads: int = 8
  region: int = 4
  ratios: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1.0)
  temperature: float = 1.0
  means: bool = True
  dense: bool = False
  qkv_features: int | None = None
  keys: KeyProjection | None = None

  @nn.compact
  def __call__(
    self, grid: Float[Array, 'n y x d']
  ) -> tuple[Float[Array, 'n y x d'], dict[str, Array]]:
    """Messages for every token.

    Args:
      grid: normalised tokens.

    Returns:
      The messages, and what was chosen, if anything is: `kept` (n,), the
      share of pairs of regions that is kept; `divergence` (n,), −log of the
      dense attention that remains, as `losses.kept_mass_loss` has it, the mean
      over heads and rows; `blocks` (n, h, i, k), the regions that each keeps,
      best first, −1 behind them, with one h where heads read the same ones;
      `cut` (2,), regions along each side.

    Raises:
      ValueError: a ratio is not in (0, 1], or the heads do not divide the width
        of the queries.
    """
    if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
      raise ValueError(f'ratios must lie in (0, 1]: {self.ratios=}')
    n, height, width, features = grid.shape
    side = region_side(height, width, self.region)
    cell = cell_side(side)
    inner = self.qkv_features or features
    projected = queries_keys_values(
      grid.reshape(n, height * width, features),
      inner,
      self.keys,
      grid=(height, width),
    )
    queries, keys, values = (
      split_heads(
        _to_regions(x.reshape(n, height, width, inner), side, cell),
        self.num_heads,
      )
      for x in projected
    )
    if self.means and side == 1:
      messages, told = attend(queries, keys, values), {}
    else:
      messages, told = self._chosen(queries, keys, values, side)
      told['cut'] = jnp.asarray((height // side, width // side))
    messages = _to_grid(
      messages.reshape(n, -1, inner), (height, width), side, cell
    )
    return nn.Dense(features, name='out')(messages), told

  def _chosen(
    self, queries: Array, keys: Array, values: Array, side: int
  ) -> tuple[Array, dict[str, Array]]:
    """Messages (n, t, h, f) by the kept regions, and what was chosen."""
    scores = self._scores(queries, keys, side)
    count = scores.shape[-1]
    ratio = self._ratio(jax.lax.stop_gradient(scores))
    indices = self._best_regions(scores, ratio)
    hard = block_mask(indices, count).astype(jnp.float32)

    def kept(scores: Array) -> Array:
      soft = soft_keep(
        scores, ratio * count, self.temperature, own=jnp.arange(count)
      )
      return straight_through(hard, soft)

    seen = jax.tree.map(jax.lax.stop_gradient, self._seen(queries, keys, side))
    if self.dense:
      messages = attend(queries, keys, values)
    else:
      messages = self._read(queries, keys, values, indices, side)
      messages = messages + _lent(kept(scores), seen, values)
    masses, of_means = map(_masses, seen)
    divergence = kept_mass_loss(
      masses, kept(jax.lax.stop_gradient(scores)), means=of_means
    )
    return messages, {
      # Budget and divergence are a matter of ρ alone. Were scores and attention
      # to learn from them, all would look at one and the same region.
      'kept': straight_through(
        jnp.mean(hard, axis=(1, 2, 3)), jnp.mean(ratio, axis=(1, 2))
      ),
      'divergence': jnp.mean(divergence, axis=(1, 2)),
      'blocks': indices,
    }

  def _read(
    self, queries: Array, keys: Array, values: Array, indices: Array, side: int
  ) -> Array:
    """Messages from the regions of `indices`, and the means of the others."""
    block = side * side
    if not self.means:
      return attend_blocks(queries, keys, values, indices, block=block)
    parts = block // cell_side(side) ** 2
    return attend_blocks_and_means(
      queries, keys, values, indices, block=block, parts=parts
    )

  def _ratio(self, scores: Array) -> Array:
    """ρ of every row, (n, h, i): a candidate, with a soft gradient."""
    candidates = jnp.asarray(self.ratios, jnp.float32)
    if len(self.ratios) == 1:
      return jnp.broadcast_to(candidates, scores.shape[:-1])
    # Rows are all nearly flat at first and peaked later: logarithms tell them
    # apart at both ends, and the constants bring them to about zero.
    rows = scores - jnp.mean(scores, axis=-1, keepdims=True)
    entropy, peak, deviation = jnp.split(row_statistics(rows), 3, axis=-1)
    flatness = jnp.log(entropy + 1e-4) - jnp.log(1 - entropy + 1e-4)
    height, spread = jnp.log(peak + 1e-3), jnp.log(deviation + 1e-3)
    told = jnp.concatenate([flatness / 2 - 1, height, spread], axis=-1)
    # Begins with the share that is as good as all of a row: exp(entropy) of
    # its regions.
    prior = (entropy.squeeze(-1) - 1) * math.log2(scores.shape[-1])
    logits = SizeLogits(16, self.ratios, name='ratio')(told, prior)
    if self.has_rng('dropout'):
      noise = jax.random.gumbel(self.make_rng('dropout'), logits.shape)
      logits = (logits + noise) / self.temperature
    chosen = straight_through(
      jax.nn.one_hot(jnp.argmax(logits, axis=-1), len(self.ratios)),
      jax.nn.softmax(logits, axis=-1),
    )
    return chosen @ candidates

  def _scores(self, queries: Array, keys: Array, side: int) -> Array:
    """S (n, h, i, j): what a closer look of region i at region j gives."""
    asking = block_means(queries, side * side)
    if not self.means:
      heads, features = queries.shape[2:]
      together = jnp.einsum(
        'nihf,njhf->nij', asking, block_means(keys, side * side)
      )
      return together[:, None] / math.sqrt(heads * features)
    cell = cell_side(side) ** 2
    lost = weights_by_block(asking, keys, block=cell).lost
    lost = lost.reshape(*lost.shape[:3], -1, side * side // cell)
    return jnp.log(jnp.sum(lost, axis=-1) + LEAST_LOSS)

  def _best_regions(self, scores: Array, ratio: Array) -> Array:
    """The kept regions (n, h, i, j), best first, −1 behind them."""
    scores, ratio = map(jax.lax.stop_gradient, (scores, ratio))
    count = scores.shape[-1]
    most = math.ceil(max(self.ratios) * count)
    return topk_indices(
      scores, keep_counts(ratio, count), most=most, own=jnp.arange(count)
    )

  def _seen(
    self, queries: Array, keys: Array, side: int
  ) -> tuple[Array, Array]:
    """Of one token of every region: a and c (n, h, i, j, t), by region."""
    n, t, h, f = queries.shape
    block = side * side
    place = jnp.full((n, t // block), block // 2)
    if self.has_rng('dropout'):
      place = jax.random.randint(
        self.make_rng('dropout'), place.shape, 0, block
      )
    asking = jnp.take_along_axis(
      queries.reshape(n, t // block, block, h, f),
      place[:, :, None, None, None],
      axis=2,
    )
    found = weights_by_block(asking[:, :, 0], keys, block=cell_side(side) ** 2)
    of_means = jnp.broadcast_to(found.means[..., None], found.weights.shape)
    if not self.means:
      of_means = jnp.zeros_like(found.weights)
    shape = (*of_means.shape[:3], -1, block)
    return found.weights.reshape(shape), of_means.reshape(shape)


def _masses(weights: Array) -> Array:
  """P or C (n, h, i, j), the weight of a region."""
  return jnp.sum(weights, axis=-1)


def _lent(kept: Array, seen: tuple[Array, Array], values: Array) -> Array:
  """Zero, with the gradient by the choice of the messages to some tokens.

  Those to the token of a region stand for all of its tokens.
  """
  attention, of_means = seen
  n, block = values.shape[0], attention.shape[-1]
  weights = of_means + kept[..., None] * (attention - of_means)
  messages = jnp.einsum(
    'nhijt,njthf->nihf',
    weights,
    jax.lax.stop_gradient(values).reshape(n, -1, block, *values.shape[2:]),
    preferred_element_type=jnp.float32,
  )
  total = jnp.sum(weights, axis=(-2, -1))
  total = jnp.maximum(total, LEAST_LENT)
  messages = messages / jnp.moveaxis(total, 1, 2)[..., None]
  messages = jnp.repeat(messages.astype(values.dtype), block, axis=1)
  return straight_through(jnp.zeros_like(messages), messages)


def _to_regions(grid: Array, side: int, cell: int) -> Array:
  """(n, y, x, d) to (n, t, d): region by region, and cell by cell in each."""
  n, height, width, d = grid.shape
  inner = side // cell, cell
  cut = grid.reshape(n, height // side, *inner, width // side, *inner, d)
  return cut.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(n, height * width, d)


def _to_grid(
  tokens: Array, shape: tuple[int, int], side: int, cell: int
) -> Array:
  """The inverse of `_to_regions`, for a grid of rows and columns."""
  (height, width), (n, _, d) = shape, tokens.shape
  outer, parts = (height // side, width // side), side // cell
  cut = tokens.reshape(n, *outer, parts, parts, cell, cell, d)
  return cut.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(n, height, width, d)
