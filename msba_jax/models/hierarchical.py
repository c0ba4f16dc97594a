"""NEXUS across scales: levels fused region by region, image by image.

Attributes:
  HierarchicalFusion: the stage, in place of CFI.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.models.blocks import FeedForward

__all__ = ['HierarchicalFusion']


class HierarchicalFusion(nn.Module):
  r"""A map of regions from all levels, then its weighted mean.

      map_n = Σ_l α_nl Y_nl + Σ_{l<L} β_nl FFN([Y_nl; Y_n,l+1])
      F_n   = Σ_r softmax_r(v·norm(map_nr)/√d) map_nr

  The regions of all levels stand on one grid, so that the map is made position
  by position. Each image decides how much it takes of a level, and of a pair of
  neighbouring ones, by what it holds there:

      α_nl = softmax_l(a_l + w_l·mean_r norm(Y_nl))
      β_nl = softmax_l(b_l + u_l·[mean_r norm(Y_nl); mean_r norm(Y_n,l+1)])

  w, u and v begin as zero: the stage begins as `CrossLevelIntegration`, whose
  parameters it has under the same names. A norm has none of its own. What is
  alone weighs one, and makes no parameters.

  Attributes:
    ratio: hidden width of the feed-forward over that of a region.
  """

  ratio: int = 2

  @nn.compact
  def __call__(
    self, regions: Float[Array, 'l n r d']
  ) -> tuple[Float[Array, 'n d'], dict[str, Array]]:
    """Returns one vector an image.

    Args:
      regions: of all levels, fine to coarse.

    Returns:
      The vectors, and `levels` (l, n), `pairs` (l − 1, n) where there are any,
      and `regions` (n, r): weights that sum to one over levels, pairs, regions.
    """
    features = regions.shape[-1]
    held = jnp.mean(_standardized(regions), axis=2)
    levels = self._shares('level', held)
    fused = jnp.einsum('ln,lnrd->nrd', levels, regions)
    aux = {'levels': levels}
    if len(regions) > 1:
      pairs = self._shares(
        'pair', jnp.concatenate([held[:-1], held[1:]], axis=-1)
      )
      joined = jnp.concatenate([regions[:-1], regions[1:]], axis=-1)
      mixed = FeedForward(self.ratio * features, features, name='pair')(joined)
      fused = fused + jnp.einsum('ln,lnrd->nrd', pairs, mixed)
      aux['pairs'] = pairs
    seeks = self.param('region_seeks', nn.initializers.zeros, (features,))
    scores = jnp.einsum('nrd,d->nr', _standardized(fused), seeks)
    importance = jax.nn.softmax(scores / math.sqrt(features), axis=-1)
    aux['regions'] = importance
    return jnp.einsum('nr,nrd->nd', importance, fused), aux

  def _shares(self, name: str, held: Float[Array, 'l n e']) -> Array:
    """(l, n): how much an image takes of each, by what it holds there."""
    count, _, width = held.shape
    if count == 1:
      return jnp.ones(held.shape[:2])
    zeros = nn.initializers.zeros
    logits = self.param(f'{name}_logits', zeros, (count,))
    seeks = self.param(f'{name}_seeks', zeros, (count, width))
    found = jnp.einsum('lne,le->ln', held, seeks)
    return jax.nn.softmax(logits[:, None] + found, axis=0)


def _standardized(regions: Array) -> Array:
  """Features of mean zero and variance one."""
  return jax.nn.standardize(regions, axis=-1, epsilon=1e-6)
