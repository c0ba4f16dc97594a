"""ResNet with bottlenecks, whose statistics stay those it was trained with.

Attributes:
  ResNetSpec: sizes.
  VARIANTS: named sizes.
  ResNet: the module.
  resnet_names: where its parameters stand in a published checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.models.weight_names import (
  Tensor,
  conv_tensors,
  identity,
  norm_tensors,
)

__all__ = ['VARIANTS', 'ResNet', 'ResNetSpec', 'resnet_names']

# Keeps the variance of what a rectifier halves: Delving Deep into Rectifiers
# (2015), arXiv 1502.01852.
kernel_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


@dataclass(frozen=True)
class ResNetSpec:
  """Sizes of a `ResNet`.

  Attributes:
    blocks: bottlenecks of every stage; the grid halves before each but the
      first.
    widths: channels of every stage; a bottleneck has a quarter of them inside.
    stem: channels of the first convolution.
    levels: how many of the last stages the pyramid returns.
  """

  blocks: tuple[int, ...]
  widths: tuple[int, ...] = (256, 512, 1024, 2048)
  stem: int = 64
  levels: int = 3


# Table 1 of Deep Residual Learning for Image Recognition (2015), arXiv
# 1512.03385.
VARIANTS = {
  'resnet_50': ResNetSpec((3, 4, 6, 3)),
  'resnet_101': ResNetSpec((3, 4, 23, 3)),
}


class ResNet(nn.Module):
  """Bottlenecks with batch normalisation, strided in their 3 × 3 convolution.

  The stride is where version 1.5 has it; the paper strides the 1 × 1
  convolution before.

  Attributes:
    spec: sizes.
    frozen_statistics: always normalises with the stored statistics, the
      collection 'batch_stats', and never changes them. False takes those of the
      batch in training and moves the stored ones a tenth of the way; the caller
      makes 'batch_stats' mutable.
    dtype: of the computation and the result; None is what images and
      parameters promote to. Parameters and statistics are float32.

  Source: Deep Residual Learning for Image Recognition (2015), arXiv 1512.03385;
  Batch Normalization (2015), arXiv 1502.03167.
  """

  spec: ResNetSpec = VARIANTS['resnet_50']
  frozen_statistics: bool = True
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(
    self, images: Float[Array, 'n height width 3'], *, train: bool = False
  ) -> tuple[Float[Array, 'n _ _ _'], ...]:
    """Returns the grids of the last stages, fine to coarse, never negative.

    Raises:
      ValueError: widths and blocks differ in length, the levels are not between
        one and the stages, or a width is no multiple of four.
    """
    spec = self.spec
    _check(spec)
    stored = self.frozen_statistics or not train
    grid = ConvNorm(spec.stem, 7, 2, stored, self.dtype, name='stem')(images)
    # Behind a rectifier zeros are as good as nothing to a maximum.
    grid = jnp.pad(jax.nn.relu(grid), ((0, 0), (1, 1), (1, 1), (0, 0)))
    grid = nn.max_pool(grid, (3, 3), (2, 2))
    stages = []
    for i, (width, blocks) in enumerate(
      zip(spec.widths, spec.blocks, strict=True)
    ):
      for j in range(blocks):
        stride = 2 if i > 0 and j == 0 else 1
        grid = Bottleneck(
          width, stride, stored, self.dtype, name=f'stage_{i}_{j}'
        )(grid)
      stages.append(grid)
    return tuple(stages[-spec.levels :])


class Bottleneck(nn.Module):
  """1 × 1, 3 × 3 and 1 × 1 convolutions, added to the (projected) input.

  Attributes:
    features: channels of the result.
    stride: of the 3 × 3 convolution.
    stored: whether the stored statistics normalise.
    dtype: of the computation.
  """

  features: int
  stride: int
  stored: bool
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, grid: Array) -> Array:
    """(n, y, x, d) to (n, ⌈y / stride⌉, ⌈x / stride⌉, features)."""

    def conv(inputs: Array, features: int, size: int, stride: int, name: str):
      return ConvNorm(
        features, size, stride, self.stored, self.dtype, name=name
      )(inputs)

    inner = jax.nn.relu(conv(grid, self.features // 4, 1, 1, 'conv_0'))
    inner = jax.nn.relu(
      conv(inner, self.features // 4, 3, self.stride, 'conv_1')
    )
    inner = conv(inner, self.features, 1, 1, 'conv_2')
    if self.stride != 1 or grid.shape[-1] != self.features:
      grid = conv(grid, self.features, 1, self.stride, 'shortcut')
    return jax.nn.relu(grid + inner)


class ConvNorm(nn.Module):
  """A convolution without bias, then batch normalisation.

  Attributes:
    features: channels of the result.
    size: side of the kernel, odd; half of it is padded all around.
    stride: of the convolution.
    stored: whether the stored statistics normalise.
    dtype: of the computation.
  """

  features: int
  size: int
  stride: int
  stored: bool
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, grid: Array) -> Array:
    """(n, y, x, d) to (n, ⌈y / stride⌉, ⌈x / stride⌉, features)."""
    grid = nn.Conv(
      self.features,
      (self.size, self.size),
      self.stride,
      padding=self.size // 2,
      use_bias=False,
      kernel_init=kernel_init,
      dtype=self.dtype,
      name='conv',
    )(grid)
    return nn.BatchNorm(
      use_running_average=self.stored,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
      name='norm',
    )(grid)


def resnet_names(
  spec: ResNetSpec, *, prefix: str = 'resnet.'
) -> Iterator[Tensor]:
  """Every parameter and statistic of a `ResNet`, and where it comes from.

  The names are those of files such as microsoft/resnet-50.

  Args:
    spec: sizes.
    prefix: what the names of the tensors begin with; '' in a file of the model
      without a head.

  Yields:
    One entry an array.

  Raises:
    ValueError: the sizes do not fit together, as in `ResNet`.
  """
  _check(spec)
  yield from _conv_names(f'{prefix}embedder.embedder', ('stem',))
  for i, (width, blocks) in enumerate(
    zip(spec.widths, spec.blocks, strict=True)
  ):
    for j in range(blocks):
      source, ours = f'{prefix}encoder.stages.{i}.layers.{j}', f'stage_{i}_{j}'
      for k in range(3):
        yield from _conv_names(f'{source}.layer.{k}', (ours, f'conv_{k}'))
      if j == 0 and (i > 0 or width != spec.stem):
        yield from _conv_names(f'{source}.shortcut', (ours, 'shortcut'))


def _conv_names(source: str, path: tuple[str, ...]) -> Iterator[Tensor]:
  norm = f'{source}.normalization'
  yield from conv_tensors(f'{source}.convolution', (*path, 'conv'), bias=False)
  yield from norm_tensors(norm, (*path, 'norm'))
  for name in ('mean', 'var'):
    yield Tensor(
      (f'{norm}.running_{name}',),
      ('batch_stats', *path, 'norm', name),
      identity,
    )


def _check(spec: ResNetSpec) -> None:
  stages = len(spec.blocks)
  if stages != len(spec.widths) or not 0 < spec.levels <= stages:
    raise ValueError(
      'one number of blocks a stage, and at least as many stages as levels: '
      f'{spec.widths=} {spec.blocks=} {spec.levels=}'
    )
  if any(width % 4 for width in spec.widths):
    raise ValueError(f'four must divide the widths: {spec.widths=}')
