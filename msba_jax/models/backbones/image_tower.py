"""The image towers of CLIP and SigLIP: a `ViT` and its head.

Attributes:
  ImageTower: images to embeddings that are compared with those of texts.
  AttentionPool: one learned query reads all tokens.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.layers.attention import attend
from msba_jax.models.backbones.vit import ACTIVATIONS, ViT
from msba_jax.models.blocks import FeedForward, split_heads

__all__ = ['AttentionPool', 'ImageTower']


class ImageTower(nn.Module):
  """Images to embeddings that are compared with those of texts.

  Attributes:
    vit: the transformer.
    head: `class_token` projects the normalised class token (CLIP), `attention`
      is an `AttentionPool` of all normalised tokens (SigLIP).
    embedding: width of the result of `class_token`.

  Source: Learning Transferable Visual Models From Natural Language Supervision
  (2021), arXiv 2103.00020; Sigmoid Loss for Language Image Pre-Training (2023),
  arXiv 2303.15343.
  """

  vit: ViT
  head: Literal['class_token', 'attention']
  embedding: int = 512

  @nn.compact
  def __call__(
    self, images: Float[Array, 'n height width c']
  ) -> Float[Array, 'n e']:
    """Returns embeddings as they are trained: not of unit norm.

    Raises:
      ValueError: the head wants a class token and the transformer has none.
    """
    spec = self.vit.spec
    tokens = self.vit.encode(images).normalized
    if self.head == 'attention':
      pool = AttentionPool(
        spec.num_heads,
        spec.hidden or 4 * spec.features,
        ACTIVATIONS[spec.activation],
        spec.epsilon,
        self.vit.dtype,
        name='pool',
      )
      return pool(tokens).astype(jnp.float32)
    if not spec.class_token:
      raise ValueError("head='class_token' needs spec.class_token=True")
    project = nn.Dense(
      self.embedding, use_bias=False, dtype=self.vit.dtype, name='projection'
    )
    return project(tokens[:, 0]).astype(jnp.float32)


class AttentionPool(nn.Module):
  """One learned query reads all tokens; a feed-forward with residual follows.

  Attributes:
    num_heads: number of heads.
    hidden: width of the feed-forward.
    activation: of the feed-forward.
    epsilon: of the norm.
    dtype: of the computation; None is that of the inputs.

  Source: Scaling Vision Transformers (2021), arXiv 2106.04560.
  """

  num_heads: int
  hidden: int
  activation: Any
  epsilon: float = 1e-6
  dtype: Any = None

  @nn.compact
  def __call__(self, tokens: Float[Array, 'n t d']) -> Float[Array, 'n d']:
    """Returns one vector for each image."""
    n, _, features = tokens.shape
    probe = self.param('probe', nn.initializers.normal(0.02), (1, features))
    asking = nn.Dense(features, dtype=self.dtype, name='query')(
      probe.astype(tokens.dtype)
    )
    asking = jnp.broadcast_to(asking[None], (n, 1, features))
    answering = nn.Dense(2 * features, dtype=self.dtype, name='keys_values')(
      tokens
    )
    keys, values = jnp.split(answering, 2, axis=-1)
    queries, keys, values = (
      split_heads(x, self.num_heads) for x in (asking, keys, values)
    )
    read = attend(queries, keys, values).reshape(n, features)
    read = nn.Dense(features, dtype=self.dtype, name='out')(read)
    norm = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name='norm')
    feed_forward = FeedForward(
      self.hidden,
      activation=self.activation,
      dtype=self.dtype,
      name='feed_forward',
    )
    return read + feed_forward(norm(read))
