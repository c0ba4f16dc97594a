"""Self-attention of a grid over the few regions that a row of it needs.

Attributes:
  SparseAttention: regions choose regions, and how many.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.layers.attention import attend
from msba_jax.layers.choice import straight_through
from msba_jax.layers.sparse import attend_blocks, block_mask
from msba_jax.layers.sparsity import (
  keep_counts,
  row_statistics,
  soft_keep,
  sparse_weights,
  topk_indices,
)
from msba_jax.losses.sparsity import kept_mass_loss
from msba_jax.models.blocks import (
  KeyProjection,
  queries_keys_values,
  split_heads,
)
from msba_jax.models.size_logits import SizeLogits

__all__ = ['SparseAttention', 'region_side']


def region_side(height: int, width: int, most: int) -> int:
  """The largest side of square regions, up to `most`, that tile a grid.

  One region alone would leave nothing to choose: there are at least two, if
  the grid has two tokens.
  """
  sides = (s for s in range(1, most + 1) if not (height % s or width % s))
  return max((s for s in sides if s * s < height * width), default=1)


class SparseAttention(nn.Module):
  r"""Tokens look at the regions that their own region finds important.

  The grid is cut into square regions. Region i scores region j by the product
  of mean query and mean key, S_ij; a small network reads the entropy, maximum
  and deviation of the row S_i and says which share ρ_i of all regions the row
  keeps, among them always its own; softmax attention runs over the tokens of
  the kept regions, and only those are gathered.

  Where there is a key 'dropout', as in training, ρ_i is drawn by a Gumbel
  softmax with a straight-through gradient. What the choice is worth is measured
  at one token of every region, drawn anew in training: P_ij is the share of its
  dense attention that falls on region j, the mean over heads. The choice itself
  has no gradient, so that one is lent to it: attention among means of regions
  under the mask,

      m̃_i = Σ_j P_ij M_ij v̄_j / Σ_j P_ij M_ij,

  of which the value is not added and the gradient by M is.

  Attributes:
    num_heads: number of heads.
    region: largest side of a region, in tokens; smaller where it would not
      tile the grid, or would be all of it.
    ratios: candidates of ρ; a single one is not chosen.
    temperature: of the Gumbel softmax and of the mask's gradient.
    dense: attends to everything with the same parameters, and tells how far the
      choice would be from it.
    keys: makes the module of the keys; None is a plain projection.

  Source: BiFormer: Vision Transformer with Bi-Level Routing Attention (2023),
  arXiv 2303.08810, for regions by products of means; MoBA (2025), arXiv
  2502.13189. The network is that of this project.
  """

  num_heads: int = 8
  region: int = 4
  ratios: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1.0)
  temperature: float = 1.0
  dense: bool = False
  keys: KeyProjection | None = None

  @nn.compact
  def __call__(
    self, grid: Float[Array, 'n y x d']
  ) -> tuple[Float[Array, 'n y x d'], dict[str, Array]]:
    """Messages for every token.

    Args:
      grid: normalised tokens.

    Returns:
      The messages, and `kept` (n,), the share of pairs of regions that is
      kept; `divergence` (n,), −log of the dense attention that falls on them,
      Σ_j P_ij M_ij, the mean over rows; `blocks` (n, i, i), the kept regions
      of each region by importance, −1 behind them; `cut` (2,), regions along
      each side.

    Raises:
      ValueError: a ratio is not in (0, 1], or the heads do not divide the
        features.
    """
    if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
      raise ValueError(f'ratios must lie in (0, 1]: {self.ratios=}')
    n, height, width, features = grid.shape
    side = region_side(height, width, self.region)
    projected = [
      _to_regions(x.reshape(grid.shape), side)
      for x in queries_keys_values(
        grid.reshape(n, height * width, features),
        features,
        self.keys,
        grid=(height, width),
      )
    ]
    means = [
      jnp.mean(x.reshape(n, -1, side * side, features), axis=2)
      for x in projected
    ]
    scores = jnp.einsum(
      'nid,njd->nij', *means[:2], preferred_element_type=jnp.float32
    ) / math.sqrt(features)
    count = scores.shape[-1]
    ratio = self._ratio(jax.lax.stop_gradient(scores))
    own = jnp.arange(count)
    indices = topk_indices(
      jax.lax.stop_gradient(scores),
      keep_counts(jax.lax.stop_gradient(ratio), count),
      own=own,
    )
    hard = block_mask(indices, count).astype(jnp.float32)

    def kept(scores: Array) -> Array:
      soft = soft_keep(scores, ratio * count, self.temperature, own=own)
      return straight_through(hard, soft)

    queries, keys, values = (split_heads(x, self.num_heads) for x in projected)
    seen = jax.lax.stop_gradient(self._seen(queries, keys, count))
    if self.dense:
      messages = attend(queries, keys, values)
    else:
      messages = attend_blocks(
        queries, keys, values, indices[:, None], block=side * side
      )
      messages = messages + _lent(kept(scores), seen, means[2], messages)
    messages = _to_grid(messages.reshape(n, -1, features), grid, side)
    divergence = kept_mass_loss(seen, kept(jax.lax.stop_gradient(scores)))
    return nn.Dense(features, name='out')(messages), {
      # Budget and divergence are a matter of ρ alone. Were scores and attention
      # to learn from them, all would look at one and the same region.
      'kept': straight_through(
        jnp.mean(hard, axis=(1, 2)), jnp.mean(ratio, axis=1)
      ),
      'divergence': jnp.mean(divergence, axis=1),
      'blocks': indices,
      'cut': jnp.asarray((height // side, width // side)),
    }

  def _ratio(self, scores: Array) -> Array:
    """ρ of every row, (n, i): one of the candidates, with a soft gradient."""
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
    return jnp.einsum('nik,k->ni', chosen, candidates)

  def _seen(self, queries: Array, keys: Array, count: int) -> Array:
    """P (n, i, j): of what a token of region i sees, the share in region j."""
    n, t, h, f = queries.shape
    place = jnp.full((n, count), t // count // 2)
    if self.has_rng('dropout'):
      place = jax.random.randint(
        self.make_rng('dropout'), place.shape, 0, t // count
      )
    asking = jnp.take_along_axis(
      queries.reshape(n, count, t // count, h, f),
      place[:, :, None, None, None],
      axis=2,
    )
    logits = jnp.einsum(
      'nihf,nthf->nhit',
      asking[:, :, 0],
      keys,
      preferred_element_type=jnp.float32,
    ) / math.sqrt(f)
    attention = jax.nn.softmax(logits, axis=-1)
    shares = attention.reshape(n, h, count, count, t // count)
    return jnp.mean(jnp.sum(shares, axis=-1), axis=1)


def _lent(kept: Array, seen: Array, means: Array, messages: Array) -> Array:
  """Zero, with the gradient that attention among means has by the mask."""
  coarse = jnp.einsum(
    'nij,njd->nid',
    sparse_weights(seen, kept),
    jax.lax.stop_gradient(means).astype(jnp.float32),
  )
  n, t, h, f = messages.shape
  coarse = coarse.astype(messages.dtype).reshape(n, -1, h, f)
  coarse = jnp.repeat(coarse, t // coarse.shape[1], axis=1)
  return straight_through(jnp.zeros_like(coarse), coarse)


def _to_regions(grid: Array, side: int) -> Array:
  """(n, y, x, d) to (n, t, d), the tokens of a region one after another."""
  n, height, width, d = grid.shape
  cut = grid.reshape(n, height // side, side, width // side, side, d)
  return jnp.swapaxes(cut, 2, 3).reshape(n, height * width, d)


def _to_grid(tokens: Array, like: Array, side: int) -> Array:
  """The inverse of `_to_regions`, in the shape of a grid."""
  n, height, width, d = like.shape
  cut = tokens.reshape(n, height // side, width // side, side, side, d)
  return jnp.swapaxes(cut, 2, 3).reshape(n, height, width, d)
