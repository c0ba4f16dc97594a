"""A vision transformer with a convolutional stem that returns a pyramid.

Attributes:
  StemViTSpec: sizes.
  VARIANTS: named sizes.
  StemViT: the module.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from msba_jax.models.blocks import TransformerBlock

__all__ = ['VARIANTS', 'StemViT', 'StemViTSpec']


@dataclass(frozen=True)
class StemViTSpec:
  """Sizes of a `StemViT`.

  Attributes:
    features: width of the tokens.
    depth: number of blocks.
    num_heads: heads of a block.
    patch: pixels along a side of a token, a power of two, at least 4.
  """

  features: int
  depth: int
  num_heads: int
  patch: int = 8


# Widths and heads of Ti and S: DeiT (2020), arXiv 2012.12877. `pico` and `nano`
# are ours, for images of 32 to 64 pixels on a CPU.
VARIANTS = {
  'pico': StemViTSpec(64, 4, 4),
  'nano': StemViTSpec(128, 6, 4),
  'tiny': StemViTSpec(192, 12, 3, patch=16),
  'small': StemViTSpec(384, 12, 6, patch=16),
}


class StemViT(nn.Module):
  """Convolutions of stride two down to the patch, then transformer blocks.

  The pyramid, fine to coarse: the stem at half the patch, the tokens after half
  the blocks, the tokens after all of them.

  Attributes:
    spec: sizes.

  Source: Early Convolutions Help Transformers See Better (2021), arXiv
  2106.14881.
  """

  spec: StemViTSpec = VARIANTS['pico']

  @nn.compact
  def __call__(
    self, images: Float[Array, 'n height width c'], *, train: bool = False
  ) -> tuple[Float[Array, 'n _ _ _'], ...]:
    """Returns the three levels as grids.

    Raises:
      ValueError: the patch is no power of two of at least 4, or does not divide
        the image.
    """
    spec = self.spec
    steps = spec.patch.bit_length() - 1
    if spec.patch < 4 or spec.patch != 1 << steps:
      raise ValueError(f'{spec.patch=} must be a power of two, at least 4')
    if images.shape[1] % spec.patch or images.shape[2] % spec.patch:
      raise ValueError(f'{spec.patch=} must divide {images.shape[1:3]=}')
    grid, fine = images, images
    for i in range(steps):
      fine = grid
      grid = nn.Conv(
        spec.features >> max(steps - 1 - i, 0), (3, 3), 2, name=f'stem_{i}'
      )(grid)
      if i < steps - 1:
        grid = jax.nn.gelu(nn.LayerNorm(name=f'stem_norm_{i}')(grid))
    n, height, width, d = grid.shape
    position = self.param(
      'position', nn.initializers.normal(0.02), (height * width, d)
    )
    tokens = grid.reshape(n, height * width, d) + position[None]
    middle = tokens
    for i in range(spec.depth):
      tokens = TransformerBlock(spec.num_heads, name=f'block_{i}')(tokens)
      if i + 1 == (spec.depth + 1) // 2:
        middle = tokens
    tokens = nn.LayerNorm(name='norm')(tokens)
    return (
      fine,
      middle.reshape(n, height, width, d),
      tokens.reshape(n, height, width, d),
    )
