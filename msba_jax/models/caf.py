"""CAF, content-adaptive fusion of what an image is and what its context says.

Attributes:
  ContentAdaptiveFusion: the stage.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.layers.normalize import safe_normalize
from msba_jax.models.blocks import FeedForward, small_init

__all__ = ['ContentAdaptiveFusion']


class ContentAdaptiveFusion(nn.Module):
  """f = π_1 f_solo + π_2 f_context, embedding = normalise(W f).

  π = softmax(MLP([f_solo; f_context])). Without a context π is (1, 0). The sum
  is written f_solo + π_2 (f_context − f_solo), exact where both are equal.

  Attributes:
    features: width of an embedding.
  """

  features: int = 128

  @nn.compact
  def __call__(
    self,
    solo: Float[Array, 'n d'],
    context: Float[Array, 'n d'] | None,
  ) -> tuple[Float[Array, 'n e'], dict[str, Array]]:
    """Returns unit embeddings, and π_2 of every image."""
    embed = nn.Dense(self.features, name='embed')
    norm = nn.LayerNorm(name='norm')
    mix = FeedForward(solo.shape[-1], 2, outer_init=small_init, name='mix')
    share = jnp.zeros(solo.shape[:1])
    fused = solo
    if context is not None or self.is_initializing():
      other = solo if context is None else context
      logits = mix(jnp.concatenate([solo, other], axis=-1))
      share = jax.nn.softmax(logits, axis=-1)[:, 1]
      if context is not None:
        fused = solo + share[:, None] * (context - solo)
    return safe_normalize(embed(norm(fused))), {'context_share': share}
