"""CASTLE: MSBA whose images attend along a causal graph.

| part | where |
|---|---|
| causal score of each pair, graph and propagation over levels | `CausalGraph` |
| causal BCP | `BidirectionalContext`, biased by the graph of each level |
| counterfactual attention | `CounterfactualAttention` |
| effect loss | `BidirectionalContext.contrast`, `losses.castle_losses` |
| choice of heads, in BCP and MSW | `keep_heads`, `JoinedHeads` |
| causal CFI | `CrossLevelIntegration`, by `dependents` |

Attributes:
  castle: the system with its defaults.
"""

import flax.linen as nn

from msba_jax.models.bcp import BidirectionalContext
from msba_jax.models.blocks import KeyProjection
from msba_jax.models.caf import ContentAdaptiveFusion
from msba_jax.models.causal_graph import CausalGraph
from msba_jax.models.cfi import CrossLevelIntegration
from msba_jax.models.counterfactual import CounterfactualAttention
from msba_jax.models.graph import ContentGraph
from msba_jax.models.msba import MSBA
from msba_jax.models.msw import JoinedHeads, MultiScaleWindows

__all__ = ['castle']


def castle(
  backbone: nn.Module,
  *,
  features: int = 64,
  embedding: int = 128,
  num_heads: int = 8,
  num_classes: int = 0,
  keys: KeyProjection | None = None,
  width: int = 64,
  gate: bool = True,
  graph: bool = True,
  counterfactual: bool = True,
  effect: bool = True,
  heads: bool = True,
) -> MSBA:
  """The system; each of its parts can be left out.

  Args:
    backbone: images to grids, fine to coarse.
    features: width of a region.
    embedding: width of an embedding.
    num_heads: heads of MSW and BCP, an even number where heads are chosen.
    num_classes: rows of the shared head; 0 is no head.
    keys: makes the modules of the keys of MSW and BCP; None is plain ones.
    width: of the queries and keys of the graph, and of what its gate reads.
    gate: the directed gate of the graph.
    graph: the causal graph; without it the content graph of MSBA, and no
      choice of heads, for which there is nothing to choose by.
    counterfactual: attention that follows leave-one-out effects.
    effect: the contrast that the effect loss needs.
    heads: the choice of half of the heads, image by image.

  Returns:
    The model, for `losses.castle_losses`.

  Raises:
    ValueError: heads shall be chosen and their number is odd.

  Example:
    >>> from msba_jax.models.backbones.conv import VARIANTS, ConvNet
    >>> model = castle(ConvNet(VARIANTS['pico']), num_classes=10)
    >>> model.bcp.keep_heads
    4
  """
  heads = heads and graph
  if heads and num_heads % 2:
    raise ValueError(f'{num_heads=} must be even: half of the heads are kept')
  return MSBA(
    backbone=backbone,
    msw=MultiScaleWindows(features, num_heads, keys=keys, apart=heads),
    bcp=BidirectionalContext(
      num_heads,
      keys=keys,
      keep_heads=num_heads // 2 if heads else None,
      reweigh=CounterfactualAttention() if counterfactual else None,
      contrast='permuted' if effect else None,
    ),
    cfi=CrossLevelIntegration(),
    caf=ContentAdaptiveFusion(embedding),
    graph=CausalGraph(width, gated=gate) if graph else ContentGraph(),
    join=JoinedHeads(num_heads) if heads else None,
    num_classes=num_classes,
  )
