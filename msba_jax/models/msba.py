"""MSBA: the base system, a composition of a backbone and four stages.

Attributes:
  MSBA: the module; every stage is a field.
  msba: the system with its defaults.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.models.bcp import BidirectionalContext, has_context
from msba_jax.models.blocks import Images, KeyProjection
from msba_jax.models.caf import ContentAdaptiveFusion
from msba_jax.models.cfi import CrossLevelIntegration
from msba_jax.models.context import AnyContext, Solo, batch, solo
from msba_jax.models.graph import ContentGraph, weigh_context
from msba_jax.models.msw import MultiScaleWindows

__all__ = ['MSBA', 'msba']

Output = dict[str, Any]


class MSBA(nn.Module):
  """Multi-scale batch attention.

      images ─ backbone ─ MSW ─ regions ─ BCP ─ CFI ─ CAF ─ embedding

  Stages are modules and may be exchanged; each returns (value, auxiliary).

  Attributes:
    backbone: images to grids, fine to coarse.
    msw: grids to regions (l, n, r, d).
    bcp: (regions, context) to regions of the same shape.
    cfi: regions to (n, d).
    caf: (solo, context or None) to (n, e), unit norm.
    graph: solo embeddings (n, e), (m, e) to a bias (n, m) of the context, or
      None.
    num_classes: rows of the shared head `out['proxies']`; 0 is no head.
  """

  backbone: nn.Module
  msw: nn.Module
  bcp: nn.Module
  cfi: nn.Module
  caf: nn.Module
  graph: nn.Module | None = None
  num_classes: int = 0

  contextual = True

  def setup(self):
    """Creates the shared head."""
    if self.num_classes:
      self.proxies = self.param(
        'proxies',
        nn.initializers.normal(1.0),
        (self.num_classes, self.caf.features),
      )

  def __call__(
    self,
    images: Images,
    *,
    context: AnyContext = solo,
    train: bool = False,
  ) -> tuple[Float[Array, 'n e'], Output]:
    """Embeds images.

    Args:
      images: normalised, or what the backbone takes.
      context: whom they may look at.
      train: for backbones that behave differently in training.

    Returns:
      Embeddings (`out['context']`, or `out['solo']` without a context) and
      `out`:

      - `solo`, `context` (n, e): unit norm;
      - `regions` (l, n, r, d): before context, as a `Context` takes them;
      - `memory`: the same without gradient, for `push_memory`;
      - `attention` (l, r, h, n, m), or None without a context;
      - `proxies` (c, e) or None;
      - `aux`: what each stage tells of itself.
    """
    levels = self.backbone(images, train=train)
    regions, aux = self.msw(levels)
    embeddings, out = self.refine(regions, context=context)
    out['aux']['msw'] = aux
    return embeddings, out

  def encode(
    self,
    images: Images,
  ) -> Float[Array, 'l n r d']:
    """Regions of images, which an index may store and `refine` takes."""
    return self.msw(self.backbone(images, train=False))[0]

  def refine(
    self, regions: Float[Array, 'l n r d'], *, context: AnyContext = solo
  ) -> tuple[Float[Array, 'n e'], Output]:
    """Embeds regions in a context; returns as `__call__` does."""
    if self.is_initializing() and isinstance(context, Solo):
      # Every parameter is made, whatever context the first call has.
      self.refine(regions, context=batch(jnp.ones(regions.shape[1], bool)))
    pooled, cfi_aux = self.cfi(regions)
    alone, _ = self.caf(pooled, None)
    graph_aux = {}
    if self.graph is not None:
      context, graph_aux = weigh_context(
        context, alone, graph=self.graph, embed=self._embed
      )
    updated, bcp_aux = self.bcp(regions, context)
    together, caf_aux = alone, {}
    if not isinstance(context, Solo):
      context_pooled, _ = self.cfi(updated)
      together, caf_aux = self.caf(pooled, context_pooled)
      looks = has_context(context, regions.shape[1])[:, None]
      together = jnp.where(looks, together, alone)
    out: Output = {
      'solo': alone,
      'context': together,
      'regions': regions,
      'memory': jax.lax.stop_gradient(regions),
      'attention': bcp_aux.get('attention'),
      'proxies': self.proxies if self.num_classes else None,
      'aux': {
        'graph': graph_aux,
        'bcp': bcp_aux,
        'cfi': cfi_aux,
        'caf': caf_aux,
      },
    }
    return together, out

  def _embed(self, regions: Array) -> Array:
    """Solo embeddings (n, e) of regions."""
    return self.caf(self.cfi(regions)[0], None)[0]


def msba(
  backbone: nn.Module,
  *,
  features: int = 64,
  embedding: int = 128,
  num_heads: int = 4,
  num_classes: int = 0,
  keys: KeyProjection | None = None,
) -> MSBA:
  """The base system.

  Args:
    backbone: images to grids, fine to coarse.
    features: width of a region.
    embedding: width of an embedding.
    num_heads: heads of MSW and BCP.
    num_classes: rows of the shared head; 0 is no head.
    keys: makes the modules of the keys of MSW and BCP; None is plain ones.

  Returns:
    The model.

  Example:
    >>> from msba_jax.models.backbones.conv import VARIANTS, ConvNet
    >>> model = msba(ConvNet(VARIANTS['pico']), num_classes=10)
    >>> model.caf.features
    128
  """
  return MSBA(
    backbone=backbone,
    msw=MultiScaleWindows(features, num_heads, keys=keys),
    bcp=BidirectionalContext(num_heads, keys=keys),
    cfi=CrossLevelIntegration(),
    caf=ContentAdaptiveFusion(embedding),
    graph=ContentGraph(),
    num_classes=num_classes,
  )
