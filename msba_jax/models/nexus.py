"""NEXUS: MSBA with attention that is spent where it matters.

| part | where |
|---|---|
| stripes in four directions, wide as an image asks | `CrossWindowAttention` |
| what is near beside what is far | the convolution of its values |
| regions that matter, and how many: the meta-network | `SparseAttention` |
| few regions of few other images | `SparseContext` |
| scales, which tell each other | `CrossWindowRegions`, `HierarchicalFusion` |

Attributes:
  nexus: the system with its defaults.
  published_mixers: attention of other works, for comparison.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn

from msba_jax.models.blocks import KeyProjection
from msba_jax.models.caf import ContentAdaptiveFusion
from msba_jax.models.cross_window_regions import (
  CrossWindowRegions,
  GridAttention,
  Mixer,
)
from msba_jax.models.cross_windows import CrossWindowAttention
from msba_jax.models.graph import ContentGraph
from msba_jax.models.hierarchical import HierarchicalFusion
from msba_jax.models.msba import MSBA
from msba_jax.models.sparse_attention import SparseAttention
from msba_jax.models.sparse_context import SparseContext

__all__ = ['nexus', 'published_mixers']


def nexus(
  backbone: nn.Module,
  *,
  features: int = 64,
  embedding: int = 128,
  heads: Sequence[int] = (2, 2, 1, 1),
  sparse_heads: int = 2,
  context_heads: int = 8,
  num_classes: int = 0,
  keys: KeyProjection | None = None,
  widths: Sequence[int] = (2, 4, 8),
  region: int = 4,
  ratios: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1.0),
  parts: int = 4,
  scales: Sequence[int] = (1,),
  own: int = 4,
  foreign: int = 4,
  mixers: Sequence[Mixer] | None = None,
) -> MSBA:
  """The system.

  Args:
    backbone: images to grids, fine to coarse.
    features: width of a region.
    embedding: width of an embedding.
    heads: heads that look along stripes, of each direction: rows, columns,
      diagonals, antidiagonals.
    sparse_heads: heads beside them that look at regions. Both kinds have the
      same width, features over their number, rounded down; either may be none.
    context_heads: heads of the attention to other images.
    num_classes: rows of the shared head; 0 is no head.
    keys: makes the modules of the keys; None is plain ones.
    widths: widths of stripes that an image may choose.
    region: side of the regions of the sparse attention, in tokens.
    ratios: shares of regions that a row may keep.
    parts: regions along a side of an image that other images may see.
    scales: of each grid of the backbone; (1, 2, 4) for one that has one grid.
    own: regions of the own image that a region sees in a context.
    foreign: regions of other images that it sees.
    mixers: attention of the grids in place of stripes and sparse attention,
      such as one of `published_mixers`.

  Returns:
    The model, for `losses.nexus_losses`.

  Raises:
    ValueError: there are no heads, or more than features.

  Example:
    >>> from msba_jax.models.backbones.conv import VARIANTS, ConvNet
    >>> model = nexus(ConvNet(VARIANTS['pico']), num_classes=10)
    >>> model.bcp.foreign
    4
  """
  if mixers is None:
    along = sum(heads)
    if not 1 <= along + sparse_heads <= features:
      raise ValueError(
        f'heads and sparse_heads, {along} + {sparse_heads}, must be from 1 to '
        f'{features=}'
      )
    of_head = features // (along + sparse_heads)
    stripes = functools.partial(
      CrossWindowAttention,
      tuple(heads),
      tuple(widths),
      qkv_features=along * of_head,
      keys=keys,
    )
    regions = functools.partial(
      SparseAttention,
      sparse_heads,
      region,
      tuple(ratios),
      qkv_features=sparse_heads * of_head,
      keys=keys,
    )
    mixers = (stripes,) * bool(along) + (regions,) * bool(sparse_heads)
  return MSBA(
    backbone=backbone,
    msw=CrossWindowRegions(features, tuple(mixers), parts, tuple(scales)),
    bcp=SparseContext(context_heads, own=own, foreign=foreign, keys=keys),
    cfi=HierarchicalFusion(),
    caf=ContentAdaptiveFusion(embedding),
    graph=ContentGraph(),
    num_classes=num_classes,
  )


def published_mixers(region: int) -> dict[str, tuple[Mixer, ...]]:
  """What the mixers of NEXUS are held against, with two heads each.

  Args:
    region: side of the regions of routing, in tokens.

  Returns:
    `mixers` of `nexus`: 'dense', every token of a grid looks at every other;
    'stripes', rows and columns in stripes of two tokens, as CSWin has them;
    'routing', a quarter of the regions, as BiFormer has them.

  Source: CSWin Transformer (2021), arXiv 2107.00652; BiFormer (2023), arXiv
  2303.08810.
  """
  return {
    'dense': (functools.partial(GridAttention, 2),),
    'stripes': (functools.partial(CrossWindowAttention, (1, 1, 0, 0), (2,)),),
    'routing': (
      functools.partial(SparseAttention, 2, region, (1 / 4,), means=False),
    ),
  }
