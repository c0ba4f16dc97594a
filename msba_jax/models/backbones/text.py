"""The text towers of CLIP and SigLIP: token ids to embeddings.

Attributes:
  TextSpec: sizes.
  VARIANTS: named sizes.
  TextTower: the module.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from msba_jax.layers.attention import attend
from msba_jax.layers.masks import causal_mask
from msba_jax.models.backbones.vit import ACTIVATIONS, Activation
from msba_jax.models.blocks import Attend, TransformerBlock, run_blocks

__all__ = ['VARIANTS', 'TextSpec', 'TextTower']


@dataclasses.dataclass(frozen=True)
class TextSpec:
  """Sizes of a `TextTower`.

  Attributes:
    features: width of the tokens.
    depth: number of blocks.
    num_heads: heads of a block.
    vocabulary: number of token ids.
    length: most tokens of a text.
    embedding: width of the result.
    hidden: width of the feed-forward; 0 is four times the features.
    causal: whether a token sees only itself and those before it.
    pooled: the token that is projected: the first that has the id `end_token`
      (`end`), or the one in the last place (`last`).
    end_token: id that ends a text.
    projection_bias: whether the projection has a bias.
    activation: of the feed-forward.
    epsilon: of the norms.
  """

  features: int
  depth: int
  num_heads: int
  vocabulary: int
  length: int
  embedding: int
  hidden: int = 0
  causal: bool = True
  pooled: Literal['end', 'last'] = 'end'
  end_token: int = 49407
  projection_bias: bool = False
  activation: Activation = 'quick_gelu'
  epsilon: float = 1e-5


# CLIP (2021), arXiv 2103.00020, tables 19 and 20; SigLIP (2023), arXiv
# 2303.15343, whose texts are 64 tokens of a vocabulary of 32,000.
VARIANTS = {
  'clip_base': TextSpec(512, 12, 8, 49_408, 77, 512),
  'clip_large': TextSpec(768, 12, 12, 49_408, 77, 768),
  'siglip_base': TextSpec(
    768,
    12,
    12,
    32_000,
    64,
    768,
    causal=False,
    pooled='last',
    projection_bias=True,
    activation='gelu_tanh',
    epsilon=1e-6,
  ),
}


class TextTower(nn.Module):
  """Token ids to embeddings that are compared with those of images.

  Texts come as their tokenizer pads them: CLIP behind the end token, which
  nothing before it sees; SigLIP with a padding token to the full length, which
  takes part.

  Attributes:
    spec: sizes.
    attend: the attention function.
    remat: see `run_blocks`.
    scan: see `run_blocks`.
    dtype: of the computation; parameters and the result are float32.
  """

  spec: TextSpec = VARIANTS['clip_base']
  attend: Attend = attend
  remat: bool = False
  scan: bool = False
  dtype: Any = None

  def __call__(self, ids: Int[Array, 'n t']) -> Float[Array, 'n e']:
    """Returns embeddings as they are trained: not of unit norm.

    Raises:
      ValueError: the texts are longer than the positions.
    """
    return self._encode(ids)[0]

  def hidden_states(
    self, ids: Int[Array, 'n t']
  ) -> tuple[Float[Array, 'n t d'], ...]:
    """The tokens before the first block and after each."""
    return self._encode(ids)[1]

  @nn.compact
  def _encode(self, ids: Array) -> tuple[Array, tuple[Array, ...]]:
    spec = self.spec
    length = ids.shape[1]
    if length > spec.length:
      raise ValueError(f'{length=} tokens are more than {spec.length=}')
    table = nn.Embed(
      spec.vocabulary, spec.features, dtype=self.dtype, name='token'
    )
    position = self.param(
      'position', nn.initializers.normal(0.02), (spec.length, spec.features)
    )
    tokens = table(ids)
    tokens = tokens + position[None, :length].astype(tokens.dtype)
    block = functools.partial(
      TransformerBlock,
      spec.num_heads,
      attend=self.attend,
      hidden=spec.hidden or None,
      activation=ACTIVATIONS[spec.activation],
      epsilon=spec.epsilon,
      dtype=self.dtype,
    )
    mask = causal_mask(length)[None, None] if spec.causal else None
    hidden = run_blocks(
      block, spec.depth, tokens, mask=mask, remat=self.remat, scan=self.scan
    )
    norm = nn.LayerNorm(epsilon=spec.epsilon, dtype=self.dtype, name='norm')
    if spec.pooled == 'end':
      last = jnp.argmax(ids == spec.end_token, axis=1)
      pooled = jnp.take_along_axis(hidden[-1], last[:, None, None], axis=1)
      pooled = pooled[:, 0]
    else:
      pooled = hidden[-1][:, -1]
    project = nn.Dense(
      spec.embedding,
      use_bias=spec.projection_bias,
      dtype=self.dtype,
      name='projection',
    )
    return project(norm(pooled)).astype(jnp.float32), (tokens, *hidden)
