"""The vision transformer of DeiT, DINOv2, CLIP and SigLIP.

Attributes:
  ViTSpec: sizes.
  VARIANTS: named sizes.
  ACTIVATIONS: functions by their names in a spec.
  Encoded: tokens of all blocks.
  ViT: the module.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.layers.attention import attend
from msba_jax.layers.positions import resize_positions
from msba_jax.models.blocks import (
  Attend,
  KeyProjection,
  TransformerBlock,
  run_blocks,
)
from msba_jax.models.stochastic_depth import drop_rates

__all__ = ['ACTIVATIONS', 'VARIANTS', 'Encoded', 'ViT', 'ViTSpec']

Activation = Literal['gelu', 'gelu_tanh', 'quick_gelu', 'silu']


def _quick_gelu(x: Array) -> Array:
  """The fast form x σ(1.702 x) of arXiv 1606.08415."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
  'quick_gelu': _quick_gelu,
  'silu': jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class ViTSpec:
  """Sizes of a `ViT`.

  Attributes:
    features: width of the tokens.
    depth: number of blocks.
    num_heads: heads of a block.
    patch: pixels along a side of a token.
    image: pixels along a side of the images that the positions are for.
    hidden: width of the feed-forward; 0 is four times the features.
    class_token: whether a token that is no patch comes first.
    registers: further tokens that are no patches.
    layer_scale: initial factor of the branches; None is none.
    norm_before: whether the tokens are normalised before the first block.
    patch_bias: whether the projection of a patch has a bias.
    activation: of the feed-forward.
    gated: whether the feed-forward has a gate, as `FeedForward`.
    epsilon: of the norms.
    antialias: whether positions are averaged for a smaller grid.
  """

  features: int
  depth: int
  num_heads: int
  patch: int = 16
  image: int = 224
  hidden: int = 0
  class_token: bool = True
  registers: int = 0
  layer_scale: float | None = None
  norm_before: bool = False
  patch_bias: bool = True
  activation: Activation = 'gelu'
  gated: bool = False
  epsilon: float = 1e-6
  antialias: bool = False

  @property
  def prefix(self) -> int:
    """Tokens before those of the grid."""
    return int(self.class_token) + self.registers


# B and L: An Image is Worth 16x16 Words (2020), arXiv 2010.11929, table 1; Ti
# and S: DeiT (2020), arXiv 2012.12877, table 1.
VARIANTS = {
  'tiny': ViTSpec(192, 12, 3),
  'small': ViTSpec(384, 12, 6),
  'base': ViTSpec(768, 12, 12),
  'large': ViTSpec(1024, 24, 16),
}
# DINOv2 (2023), arXiv 2304.07193, and with registers, arXiv 2309.16588; CLIP
# (2021), arXiv 2103.00020; SigLIP (2023), arXiv 2303.15343.
_DINOV2 = {
  f'dinov2_{name}': dataclasses.replace(
    VARIANTS[name], patch=14, image=518, layer_scale=1.0
  )
  for name in ('small', 'base', 'large')
} | {
  'dinov2_giant': ViTSpec(
    1536,
    40,
    24,
    patch=14,
    image=518,
    hidden=4096,
    layer_scale=1.0,
    activation='silu',
    gated=True,
  )
}
_CLIP = {
  'norm_before': True,
  'patch_bias': False,
  'activation': 'quick_gelu',
  'epsilon': 1e-5,
}
VARIANTS |= (
  {
    f'vit_{name}': dataclasses.replace(VARIANTS[name], epsilon=1e-12)
    for name in ('base', 'large')
  }
  | _DINOV2
  | {
    f'{name}_registers': dataclasses.replace(spec, registers=4, antialias=True)
    for name, spec in _DINOV2.items()
  }
  | {
    'clip_base_32': ViTSpec(768, 12, 12, patch=32, **_CLIP),
    'clip_base_16': ViTSpec(768, 12, 12, **_CLIP),
    'clip_large_14': ViTSpec(1024, 24, 16, patch=14, **_CLIP),
    'siglip_base': ViTSpec(
      768, 12, 12, class_token=False, activation='gelu_tanh'
    ),
  }
)


class Encoded(NamedTuple):
  """The tokens of all blocks.

  Attributes:
    hidden: (n, t, d) before the first block and after each: depth + 1 arrays.
    normalized: the last of them, normalised.
    grid: rows and columns of the patches, which are the last tokens.
  """

  hidden: tuple[Array, ...]
  normalized: Array
  grid: tuple[int, int]


class ViT(nn.Module):
  """Patches, positions and transformer blocks; images of any size.

  Attributes:
    spec: sizes.
    levels: after which blocks the grids are taken that the pyramid returns,
      counted from 1; a negative number counts from the end. All have one size.
    attend: the attention function.
    keys: makes the module of the keys; None is a plain projection.
    stochastic_depth: how probably the branches of the last block are left out
      for an image in training, those of the first never (drop path).
    remat: see `run_blocks`.
    scan: see `run_blocks`.
    dtype: of the computation; parameters are float32, and so are the returned
      grids.

  Source: An Image is Worth 16x16 Words (2020), arXiv 2010.11929; Vision
  Transformers Need Registers (2023), arXiv 2309.16588.
  """

  spec: ViTSpec = VARIANTS['tiny']
  levels: Sequence[int] = (-1,)
  attend: Attend = attend
  keys: KeyProjection | None = None
  stochastic_depth: float = 0.0
  remat: bool = False
  scan: bool = False
  dtype: Any = None

  def __call__(
    self, images: Float[Array, 'n height width c'], *, train: bool = False
  ) -> tuple[Float[Array, 'n _ _ _'], ...]:
    """Returns the grids of `levels`, each behind the final norm, float32.

    Raises:
      ValueError: the patch does not divide the image, a level is no block, or
        `stochastic_depth` is not in [0, 1).
    """
    return self._encode(images, train=train)[1]

  def encode(self, images: Float[Array, 'n height width c']) -> Encoded:
    """The tokens of all blocks, for heads and fusers.

    Raises:
      ValueError: as in `__call__`.
    """
    return self._encode(images, train=False)[0]

  @nn.compact
  def _encode(
    self, images: Array, *, train: bool
  ) -> tuple[Encoded, tuple[Array, ...]]:
    spec = self.spec
    tokens, grid = self._embed(images)
    block = functools.partial(
      TransformerBlock,
      spec.num_heads,
      attend=self.attend,
      hidden=spec.hidden or None,
      activation=ACTIVATIONS[spec.activation],
      gated=spec.gated,
      epsilon=spec.epsilon,
      layer_scale=spec.layer_scale,
      keys=self.keys,
      grid=grid,
      prefix=spec.prefix,
      dtype=self.dtype,
    )
    hidden = run_blocks(
      block,
      spec.depth,
      tokens,
      drop=drop_rates(self.stochastic_depth, spec.depth, train=train),
      remat=self.remat,
      scan=self.scan,
    )
    norm = nn.LayerNorm(epsilon=spec.epsilon, dtype=self.dtype, name='norm')
    encoded = Encoded((tokens, *hidden), norm(hidden[-1]), grid)
    levels = []
    for level in self.levels:
      if level == 0 or abs(level) > spec.depth:
        raise ValueError(
          f'{level=} must be a block, 1 to {spec.depth}, or -1 to -{spec.depth}'
        )
      tokens = norm(hidden[level - 1 if level > 0 else level])
      levels.append(_grid(tokens, spec, grid))
    return encoded, tuple(levels)

  def _embed(self, images: Array) -> tuple[Array, tuple[int, int]]:
    """Tokens before the first block, and the grid of patches."""
    spec = self.spec
    n, height, width, _ = images.shape
    if height % spec.patch or width % spec.patch:
      raise ValueError(f'{spec.patch=} must divide {images.shape[1:3]=}')
    sides = (spec.patch, spec.patch)
    patches = nn.Conv(
      spec.features,
      sides,
      sides,
      padding='VALID',
      use_bias=spec.patch_bias,
      dtype=self.dtype,
      name='patch',
    )(images)
    grid = patches.shape[1], patches.shape[2]
    side = spec.image // spec.patch
    position = self.param(
      'position', nn.initializers.normal(0.02), (side, side, spec.features)
    )
    position = resize_positions(position, grid, antialias=spec.antialias)
    patches = patches + position.astype(patches.dtype)[None]
    tokens = patches.reshape(n, -1, spec.features)
    if spec.prefix:
      first = self.param(
        'prefix', nn.initializers.normal(0.02), (spec.prefix, spec.features)
      )
      first = jnp.broadcast_to(first.astype(tokens.dtype), (n, *first.shape))
      tokens = jnp.concatenate([first, tokens], axis=1)
    if spec.norm_before:
      tokens = nn.LayerNorm(
        epsilon=spec.epsilon, dtype=self.dtype, name='norm_before'
      )(tokens)
    return tokens, grid


def _grid(tokens: Array, spec: ViTSpec, grid: tuple[int, int]) -> Array:
  """The patches (n, y, x, d) of tokens, float32."""
  patches = tokens[:, spec.prefix :].astype(jnp.float32)
  return patches.reshape(len(tokens), *grid, spec.features)
