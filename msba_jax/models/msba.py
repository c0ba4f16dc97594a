"""MSBA: the base system, a composition of a backbone and four stages.

Attributes:
  MSBA: the module; every stage is a field.
  msba: the system with its defaults.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msba_jax.layers.heads import select_heads
from msba_jax.models.bcp import BidirectionalContext, has_context
from msba_jax.models.blocks import Images, KeyProjection
from msba_jax.models.caf import ContentAdaptiveFusion
from msba_jax.models.cfi import CrossLevelIntegration
from msba_jax.models.context import (
  AnyContext,
  Solo,
  batch,
  map_regions,
  solo,
)
from msba_jax.models.graph import ContentGraph
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
    graph: gives the context a bias, or None. See `models.graph`. What it tells
      as `influence` reaches BCP, and what it tells as `dependents` CFI.
    join: for an `msw` that keeps its parts apart: (parts, factors (n, h) of
      heads or None) to regions. Then `out['regions']`, `encode` and contexts
      hold the parts, and heads may be chosen by a graph or a prompt.
    num_classes: rows of the shared head `out['proxies']`; 0 is no head.
  """

  backbone: nn.Module
  msw: nn.Module
  bcp: nn.Module
  cfi: nn.Module
  caf: nn.Module
  graph: nn.Module | None = None
  join: nn.Module | None = None
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
    prompt: Bool[Array, 'n _ _'] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, 'n e'], Output]:
    """Embeds images.

    Args:
      images: normalised, or what the backbone takes.
      context: whom they may look at.
      prompt: a mask over each image, of any size: heads are chosen by how much
        they look at it. Needs `join` and `bcp.keep_heads`.
      train: for backbones that behave differently in training.

    Returns:
      Embeddings (`out['context']`, or `out['solo']` without a context) and
      `out`:

      - `solo`, `context` (n, e): unit norm;
      - `counterfactual` (n, e): the context stream with weights that say
        nothing, if `bcp` makes one;
      - `regions` (l, n, r, d): before context, as a `Context` takes them;
      - `memory`: the same without gradient, for `push_memory`;
      - `attention` (l, r, h, n, m), or None without a context;
      - `proxies` (c, e) or None;
      - `aux`: what each stage tells of itself.

    Raises:
      ValueError: there is a prompt, and the model chooses no heads.
    """
    keep: int = getattr(self.bcp, 'keep_heads', None) or 0
    if prompt is not None and (self.join is None or not keep):
      raise ValueError(
        'a prompt chooses heads: the model needs `join` and `bcp.keep_heads`'
      )
    levels = self.backbone(images, train=train)
    if prompt is None:
      heads = None
      regions, aux = self.msw(levels)
    else:
      regions, aux = self.msw(levels, prompt=prompt)
      heads = select_heads(aux['prompt'], keep)
    embeddings, out = self.refine(regions, context=context, heads=heads)
    out['aux']['msw'] = aux
    return embeddings, out

  def encode(
    self,
    images: Images,
  ) -> Float[Array, 'l n r d']:
    """Regions of images, which an index may store and `refine` takes."""
    return self.msw(self.backbone(images, train=False))[0]

  def refine(
    self,
    regions: Float[Array, 'l n r d'],
    *,
    context: AnyContext = solo,
    heads: Float[Array, 'n h'] | None = None,
  ) -> tuple[Float[Array, 'n e'], Output]:
    """Embeds regions in a context; returns as `__call__` does.

    Args:
      regions: as `encode` gives them.
      context: whom they may look at.
      heads: factors of the heads of each image, for a model with `join`.

    Raises:
      ValueError: there are factors of heads, and the model does not join any.
    """
    if heads is not None and self.join is None:
      raise ValueError('heads are chosen where parts are joined: needs `join`')
    levels, n = regions.shape[:2]
    if self.is_initializing() and isinstance(context, Solo):
      # Every parameter is made, whatever context the first call has.
      self.refine(regions, context=batch(jnp.ones(n, bool)))
    seen, chosen = regions, {}
    if self.join is not None:
      seen = self.join(regions, heads)
      context = map_regions(self.join, context)
      regate = functools.partial(self.join, regions)
      chosen = {'heads': heads, 'regate': regate}
    pooled, cfi_aux = self.cfi(seen)
    alone, _ = self.caf(pooled, None)
    graph_aux = {}
    if self.graph is not None:
      context, graph_aux = self.graph(
        context, alone, levels=levels, embed=self._embed
      )
    if 'influence' in graph_aux:
      chosen['influence'] = graph_aux['influence']
    updated, bcp_aux = self.bcp(seen, context, **chosen)
    told = {k: v for k, v in graph_aux.items() if k == 'dependents'}
    together, caf_aux, beside = alone, {}, {}
    if not isinstance(context, Solo):
      looks = has_context(context, n)[:, None]

      def fused(updated: Array) -> tuple[Array, dict[str, Array]]:
        context_pooled, _ = self.cfi(updated, **told)
        together, aux = self.caf(pooled, context_pooled)
        return jnp.where(looks, together, alone), aux

      together, caf_aux = fused(updated)
      if 'counterfactual' in bcp_aux:
        beside['counterfactual'], _ = fused(bcp_aux.pop('counterfactual'))
    out: Output = {
      'solo': alone,
      'context': together,
      **beside,
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
