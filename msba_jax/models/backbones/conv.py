"""A small residual network for images of 32 to 64 pixels.

Attributes:
  ConvSpec: sizes.
  VARIANTS: named sizes.
  ConvNet: the module.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
from jaxtyping import Array, Float

__all__ = ['VARIANTS', 'ConvNet', 'ConvSpec']


@dataclass(frozen=True)
class ConvSpec:
  """Sizes of a `ConvNet`.

  Attributes:
    widths: channels of every stage; the grid halves before each but the first.
    blocks: residual blocks of every stage.
    stem_stride: stride of the first convolution.
    levels: how many of the last stages the pyramid returns.
  """

  widths: tuple[int, ...]
  blocks: tuple[int, ...]
  stem_stride: int = 2
  levels: int = 3


VARIANTS = {
  'pico': ConvSpec((24, 48, 96), (1, 1, 1)),
  'nano': ConvSpec((32, 64, 128, 256), (1, 1, 1, 1)),
  'micro': ConvSpec((48, 96, 192, 384), (1, 2, 2, 1)),
}


class ConvNet(nn.Module):
  """Residual blocks with group normalisation, which needs no running state.

  Attributes:
    spec: sizes.

  Source: Identity Mappings in Deep Residual Networks (2016), arXiv 1603.05027;
  Group Normalization (2018), arXiv 1803.08494.
  """

  spec: ConvSpec = VARIANTS['nano']

  @nn.compact
  def __call__(
    self, images: Float[Array, 'n height width c'], *, train: bool = False
  ) -> tuple[Float[Array, 'n _ _ _'], ...]:
    """Returns the normalised grids of the last stages, fine to coarse.

    No rectifier follows: what all images have in common would grow by it.

    Raises:
      ValueError: widths and blocks differ in length, or fewer stages than
        levels.
    """
    spec = self.spec
    if len(spec.widths) != len(spec.blocks) or spec.levels > len(spec.widths):
      raise ValueError(
        'one number of blocks a stage, and at least as many stages as levels: '
        f'{spec.widths=} {spec.blocks=} {spec.levels=}'
      )
    grid = nn.Conv(
      spec.widths[0], (3, 3), spec.stem_stride, use_bias=False, name='stem'
    )(images)
    stages = []
    for i, (width, blocks) in enumerate(
      zip(spec.widths, spec.blocks, strict=True)
    ):
      for j in range(blocks):
        stride = 2 if i > 0 and j == 0 else 1
        grid = ResidualBlock(width, stride, name=f'stage_{i}_{j}')(grid)
      stages.append(grid)
    return tuple(
      _norm(stage, f'norm_{i}')
      for i, stage in enumerate(stages)
      if i >= len(stages) - spec.levels
    )


class ResidualBlock(nn.Module):
  """norm, relu, conv, norm, relu, conv, added to the (projected) input.

  Attributes:
    features: channels of the result.
    stride: of the first convolution.
  """

  features: int
  stride: int = 1

  @nn.compact
  def __call__(self, grid: Array) -> Array:
    """(n, y, x, d) to (n, y / stride, x / stride, features)."""
    inner = jax.nn.relu(_norm(grid, 'norm_0'))
    short = grid
    if self.stride != 1 or grid.shape[-1] != self.features:
      short = nn.avg_pool(
        inner, (self.stride,) * 2, (self.stride,) * 2, padding='SAME'
      )
      short = nn.Conv(self.features, (1, 1), use_bias=False, name='shortcut')(
        short
      )
    inner = nn.Conv(
      self.features, (3, 3), self.stride, use_bias=False, name='conv_0'
    )(inner)
    inner = jax.nn.relu(_norm(inner, 'norm_1'))
    inner = nn.Conv(self.features, (3, 3), use_bias=False, name='conv_1')(inner)
    return short + inner


def _norm(grid: Array, name: str) -> Array:
  """Groups of 8 to 16 channels."""
  return nn.GroupNorm(
    num_groups=None, group_size=_group(grid.shape[-1]), name=name
  )(grid)


def _group(features: int) -> int:
  return next(size for size in (16, 12, 8, 4, 2, 1) if features % size == 0)
