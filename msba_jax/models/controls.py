"""Controls that every comparison holds itself against.

Both share the interface of `msba_jax.models.msba.MSBA`, and its last layers:
regions are one pooled vector an image, (1, n, 1, d).

Attributes:
  BackboneOnly: the backbone, pooled and projected; a context changes nothing.
  BatchFormer: a transformer layer over the batch in training, dropped after.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.layers.normalize import safe_normalize
from msba_jax.layers.pooling import generalized_mean_pool
from msba_jax.models.blocks import (
  FeedForward,
  Images,
  TransformerBlock,
  positive_parameter,
)
from msba_jax.models.context import AnyContext, BatchContext, solo

__all__ = ['BackboneOnly', 'BatchFormer']


class PooledHead(nn.Module):
  """Grids to (n, d): each level pooled, all joined, through a feed-forward.

  Attributes:
    features: d.
    hidden: width of the feed-forward, the knob that matches parameters.
  """

  features: int
  hidden: int

  @nn.compact
  def __call__(self, levels: tuple[Array, ...]) -> Array:
    """Grids (n, y, x, _) to (n, features)."""
    power = positive_parameter(self, 'power', 3.0)
    pooled = [
      generalized_mean_pool(
        grid.reshape(grid.shape[0], -1, grid.shape[-1]), power
      )
      for grid in levels
    ]
    joined = nn.LayerNorm(name='norm')(jnp.concatenate(pooled, axis=-1))
    return nn.Dense(self.features, name='project')(joined) + FeedForward(
      self.hidden, self.features, name='feed_forward'
    )(joined)


class BackboneOnly(nn.Module):
  """The backbone with a pooled head; images never meet.

  Attributes:
    backbone: images to grids.
    features: width of the pooled vector.
    hidden: width of the head's feed-forward.
    embedding: width of an embedding.
    num_classes: rows of the shared head; 0 is no head.
  """

  backbone: nn.Module
  features: int = 64
  hidden: int = 256
  embedding: int = 128
  num_classes: int = 0

  contextual = False

  def setup(self):
    """Creates the layers after the backbone."""
    self.head = PooledHead(self.features, self.hidden)
    self.norm = nn.LayerNorm()
    self.embed = nn.Dense(self.embedding)
    if self.num_classes:
      self.proxies = self.param(
        'proxies',
        nn.initializers.normal(1.0),
        (self.num_classes, self.embedding),
      )

  def __call__(
    self,
    images: Images,
    *,
    context: AnyContext = solo,
    train: bool = False,
  ) -> tuple[Float[Array, 'n e'], dict[str, object]]:
    """Embeds images; arguments and results as those of `MSBA`."""
    pooled = self.head(self.backbone(images, train=train))
    return self.refine(pooled[None, :, None], context=context)

  def encode(
    self,
    images: Images,
  ) -> Float[Array, 'l n r d']:
    """The pooled vector as one region of one level."""
    return self.head(self.backbone(images, train=False))[None, :, None]

  def refine(
    self, regions: Float[Array, 'l n r d'], *, context: AnyContext = solo
  ) -> tuple[Float[Array, 'n e'], dict[str, object]]:
    """Embeds pooled vectors."""
    alone = self._embed(regions[0, :, 0])
    together = self._in_context(regions[0, :, 0], context)
    together = alone if together is None else together
    out = {
      'solo': alone,
      'context': together,
      'regions': regions,
      'memory': jax.lax.stop_gradient(regions),
      'attention': None,
      'proxies': self.proxies if self.num_classes else None,
      'aux': {},
    }
    return together, out

  def _embed(self, pooled: Array) -> Array:
    return safe_normalize(self.embed(self.norm(pooled)))

  def _in_context(self, pooled: Array, context: AnyContext) -> Array | None:
    """Embeddings in a context; None: it changes nothing."""
    del pooled, context
    return None


class BatchFormer(BackboneOnly):
  """One transformer layer over the batch, and a shared head.

  The layer mixes the images of a training batch; both streams, before and after
  it, are supervised by one head. At test it is dropped: a memory and neighbours
  change nothing. `hidden` of the layer is `ratio` · features.

  Attributes:
    num_heads: heads of the layer.
    ratio: width of its feed-forward over `features`.

  Source: BatchFormer: Learning to Explore Sample Relationships for Robust
  Representation Learning (2022), arXiv 2203.01522.
  """

  num_heads: int = 4
  ratio: int = 4

  def setup(self):
    """Creates the layers after the backbone."""
    super().setup()
    self.over_batch = TransformerBlock(self.num_heads, self.ratio)

  def _in_context(self, pooled: Array, context: AnyContext) -> Array | None:
    if self.is_initializing():
      self.over_batch(pooled)
    if not isinstance(context, BatchContext):
      return None
    mixed = self.over_batch(pooled, mask=context.valid[None])
    looks = jnp.any(context.valid)
    return jnp.where(looks, self._embed(mixed), self._embed(pooled))
