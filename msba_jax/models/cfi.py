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
  stream and the context stream. Where a graph tells how much the other images
  depend on an image, levels at which they do more count more for it:

      λ_nl = softmax_l(λ_l + w_l log(1 + dependents_nl))

  Attributes:
    ratio: hidden width of the feed-forward over that of a region.
  """

  ratio: int = 2

  @nn.compact
  def __call__(
    self,
    regions: Float[Array, 'l n r d'],
    *,
    dependents: Float[Array, 'l n'] | None = None,
  ) -> tuple[Float[Array, 'n d'], dict[str, Array]]:
    """Returns one vector an image, and the level weights, (l,) or (l, n)."""
    levels, _, _, features = regions.shape
    logits = self.param('level_logits', nn.initializers.zeros, (levels,))
    if dependents is not None:
      trust = self.param('level_trust', nn.initializers.zeros, (levels,))
      logits = logits[:, None] + trust[:, None] * jnp.log1p(dependents)
    weight = jax.nn.softmax(logits, axis=0)
    of_image = jnp.broadcast_to(weight.reshape(levels, -1), regions.shape[:2])
    fused = jnp.einsum('ln,lnrd->nd', of_image, regions) / regions.shape[2]
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
