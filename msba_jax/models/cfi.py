"""CFI, cross-level feature integration: regions of all levels to one vector.

Attributes:
  CrossLevelIntegration: the stage.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.models.blocks import FeedForward

__all__ = ['CrossLevelIntegration']


class CrossLevelIntegration(nn.Module):
  """F = Σ_l λ_l mean_r Y_l + Σ_{l<L} μ_l mean_r FFN([Y_l; Y_{l+1}]).

  λ and μ are softmax-normalised and learned. The same parameters serve the solo
  stream and the context stream.

  Attributes:
    ratio: hidden width of the feed-forward over that of a region.
  """

  ratio: int = 2

  @nn.compact
  def __call__(
    self, regions: Float[Array, 'l n r d']
  ) -> tuple[Float[Array, 'n d'], dict[str, Array]]:
    """Returns one vector an image, and the level weights."""
    levels, _, _, features = regions.shape
    weight = jax.nn.softmax(
      self.param('level_logits', nn.initializers.zeros, (levels,))
    )
    fused = jnp.einsum('l,lnrd->nd', weight, regions) / regions.shape[2]
    aux = {'levels': weight}
    if levels > 1:
      pair = jnp.ones((1,))
      if levels > 2:  # the weight of a single pair is one
        pair = jax.nn.softmax(
          self.param('pair_logits', nn.initializers.zeros, (levels - 1,))
        )
      joined = jnp.concatenate([regions[:-1], regions[1:]], axis=-1)
      mixed = FeedForward(self.ratio * features, features, name='pair')(joined)
      fused = fused + jnp.einsum('l,lnrd->nd', pair, mixed) / regions.shape[2]
      aux['pairs'] = pair
    return fused, aux
