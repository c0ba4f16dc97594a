"""Swin Transformer: attention in windows that shift from block to block.

Attributes:
  SwinSpec: sizes.
  VARIANTS: named sizes.
  Swin: the module.
  swin_names: where its parameters stand in a published checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float

from msba_jax.layers.attention import attend
from msba_jax.models.backbones.swin_blocks import (
  PatchMerging,
  SwinBlock,
  layer_norm,
  pad_grid,
)
from msba_jax.models.blocks import Attend, KeyProjection
from msba_jax.models.stochastic_depth import drop_rates
from msba_jax.models.weight_names import (
  Tensor,
  conv_tensors,
  dense_tensors,
  identity,
  norm_tensors,
)

__all__ = ['VARIANTS', 'Swin', 'SwinSpec', 'swin_names']


@dataclass(frozen=True)
class SwinSpec:
  """Sizes of a `Swin`.

  Attributes:
    features: width of the first stage; it doubles with every further one.
    blocks: blocks of every stage; the grid halves before each but the first.
    num_heads: heads of every stage.
    window: side of a window, in tokens.
    patch: pixels along a side of a token of the first stage.
    ratio: width of the feed-forward over that of the tokens.
    levels: how many of the last stages the pyramid returns.
  """

  features: int
  blocks: tuple[int, ...]
  num_heads: tuple[int, ...]
  window: int = 7
  patch: int = 4
  ratio: int = 4
  levels: int = 3


# Swin-T, S and B of section 3.3: Swin Transformer (2021), arXiv 2103.14030.
VARIANTS = {
  'swin_tiny': SwinSpec(96, (2, 2, 6, 2), (3, 6, 12, 24)),
  'swin_small': SwinSpec(96, (2, 2, 18, 2), (3, 6, 12, 24)),
  'swin_base': SwinSpec(128, (2, 2, 18, 2), (4, 8, 16, 32)),
}


class Swin(nn.Module):
  """Stages of blocks with every second one's windows shifted by half.

  Images and grids are padded with zeros, at the right and at the bottom, to
  whole patches, windows and pairs. As in the published model, tokens may look
  at the padding, and a stage whose grid is no larger than the window in one
  direction has windows of its shorter side, none of them shifted.

  Attributes:
    spec: sizes.
    attend: the attention function.
    keys: makes the key projection, as in `WindowAttention`.
    dtype: of the computation and the result; None is what images and
      parameters promote to. Parameters are float32.
    remat: computes the blocks again in the backward pass instead of keeping
      what is inside them.
    stochastic_depth: how probably the branches of the last block are left out
      for an image in training, those of the first never (drop path). The
      published models were trained with 0.2 (T), 0.3 (S) and 0.5 (B).

  Source: Swin Transformer: Hierarchical Vision Transformer using Shifted
  Windows (2021), arXiv 2103.14030.
  """

  spec: SwinSpec = VARIANTS['swin_tiny']
  attend: Attend = attend
  keys: KeyProjection | None = None
  dtype: jax.typing.DTypeLike | None = None
  remat: bool = False
  stochastic_depth: float = 0.0

  @nn.compact
  def __call__(
    self, images: Float[Array, 'n height width 3'], *, train: bool = False
  ) -> tuple[Float[Array, 'n _ _ _'], ...]:
    """Returns the normalised grids of the last stages, fine to coarse.

    Raises:
      ValueError: blocks and heads differ in length, the levels are not between
        one and the stages, the heads do not divide the features, or
        `stochastic_depth` is not in [0, 1).
    """
    spec = self.spec
    _check(spec)
    grid = nn.Conv(
      spec.features,
      (spec.patch, spec.patch),
      spec.patch,
      padding='VALID',
      dtype=self.dtype,
      name='patch',
    )(pad_grid(images, spec.patch))
    grid = layer_norm('norm_patch', self.dtype)(grid)
    make_block = nn.remat(SwinBlock) if self.remat else SwinBlock
    rates = iter(
      drop_rates(self.stochastic_depth, sum(spec.blocks), train=train)
    )
    levels = []
    for i, blocks in enumerate(spec.blocks):
      if i > 0:
        grid = PatchMerging(self.dtype, name=f'merge_{i}')(grid)
      for j in range(blocks):
        grid = make_block(
          spec.num_heads[i],
          spec.window,
          j % 2 == 1,
          spec.ratio,
          self.attend,
          self.keys,
          self.dtype,
          name=f'stage_{i}_{j}',
        )(grid, next(rates))
      if i >= len(spec.blocks) - spec.levels:
        levels.append(layer_norm(f'norm_{i}', self.dtype)(grid))
    return tuple(levels)


def swin_names(spec: SwinSpec, *, prefix: str = 'swin.') -> Iterator[Tensor]:
  """Every parameter of a `Swin` without `keys`, and where it comes from.

  The names are those of files such as microsoft/swin-tiny-patch4-window7-224.
  Only the last stage has a norm there; those of finer ones begin as new.

  Args:
    spec: sizes.
    prefix: what the names of the tensors begin with; '' in a file of the model
      without a head.

  Yields:
    One entry a parameter.

  Raises:
    ValueError: the sizes do not fit together, as in `Swin`.
  """
  _check(spec)
  layers, stages = f'{prefix}encoder.layers', len(spec.blocks)
  yield from conv_tensors(
    f'{prefix}embeddings.patch_embeddings.projection', ('patch',)
  )
  yield from norm_tensors(f'{prefix}embeddings.norm', ('norm_patch',))
  for i in range(1, stages):
    merge = f'{layers}.{i - 1}.downsample'
    yield from norm_tensors(f'{merge}.norm', (f'merge_{i}', 'norm'))
    yield from dense_tensors(
      (f'{merge}.reduction',), (f'merge_{i}', 'reduce'), bias=False
    )
  for i, blocks in enumerate(spec.blocks):
    for j in range(blocks):
      yield from _block_names(f'{layers}.{i}.blocks.{j}', f'stage_{i}_{j}')
  for i in range(stages - spec.levels, stages - 1):
    for name, fill in (('scale', np.ones), ('bias', np.zeros)):
      path = ('params', f'norm_{i}', name)
      yield Tensor((), path, partial(fill, spec.features << i, np.float32))
  yield from norm_tensors(f'{prefix}layernorm', (f'norm_{stages - 1}',))


def _block_names(source: str, ours: str) -> Iterator[Tensor]:
  attention = f'{source}.attention.self'
  yield from norm_tensors(
    f'{source}.layernorm_before', (ours, 'norm_attention')
  )
  yield Tensor(
    (f'{attention}.relative_position_bias_table',),
    ('params', ours, 'attention', 'bias'),
    identity,
  )
  yield from dense_tensors(
    tuple(f'{attention}.{name}' for name in ('query', 'key', 'value')),
    (ours, 'attention', 'qkv'),
  )
  for theirs, path in (
    ('attention.output.dense', ('attention', 'out')),
    ('intermediate.dense', ('feed_forward', 'inner')),
    ('output.dense', ('feed_forward', 'outer')),
  ):
    yield from dense_tensors((f'{source}.{theirs}',), (ours, *path))
  yield from norm_tensors(
    f'{source}.layernorm_after', (ours, 'norm_feed_forward')
  )


def _check(spec: SwinSpec) -> None:
  stages = len(spec.blocks)
  if stages != len(spec.num_heads) or not 0 < spec.levels <= stages:
    raise ValueError(
      'one number of blocks and of heads a stage, and at least as many stages '
      f'as levels: {spec.blocks=} {spec.num_heads=} {spec.levels=}'
    )
