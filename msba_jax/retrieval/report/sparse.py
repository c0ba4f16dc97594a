"""Where a sparse model looks: the stripes and regions that images choose.

The model says itself what it decided for an image, so that nothing but one
application to some images is computed.

Attributes:
  where_it_looks: what it decided, and the images on which it differs most.
"""

from __future__ import annotations

import itertools
from typing import Any, get_args

import jax
import numpy as np
from jaxtyping import Bool, Int

from msba_jax.data.prefetch import load_batch
from msba_jax.data.source import Source
from msba_jax.layers.windows import Direction
from msba_jax.models import context as contexts
from msba_jax.retrieval.embed import Embedder
from msba_jax.retrieval.report.data import KeptRegions, SparseMap, Stripes
from msba_jax.retrieval.report.examples import Examples

# Images that are shown of each end of the order.
_EACH = 3


def where_it_looks(
  embedder: Embedder,
  source: Source,
  examples: Examples,
  indices: Int[np.ndarray, ' m'],
) -> SparseMap | None:
  """What a model decided for some images, each looking at itself alone.

  Shown are those of which the finest level keeps the smallest and the largest
  share of pairs of regions, or without regions those with the narrowest and
  the widest stripes.

  Args:
    embedder: the model.
    source: what it reads.
    examples: the same images as pictures.
    indices: the images.

  Returns:
    What it decided; None if there is no image, or if the model tells neither
    of stripes nor of regions.
  """
  if not len(indices):
    return None

  @jax.jit
  def tell(variables: Any, images: Any) -> dict[str, jax.Array]:
    _, out = embedder.apply(variables, images, contexts.solo)
    return _decisions(out)

  # Shapes say whether there is something to tell; nothing is computed.
  first = load_batch(source, indices[:1])['image']
  if not jax.eval_shape(tell, embedder.variables, first):
    return None
  images = load_batch(source, indices)['image']
  told = jax.tree.map(np.asarray, tell(embedder.variables, images))
  stripes, regions, shares = None, None, None
  if 'stripe' in told:
    grids = told['grid']
    # A stripe that is wider than its grid is as wide as the grid.
    widths = np.minimum(told['stripe'], grids.max(axis=1, keepdims=True))
    looks = told['heads'].any(axis=0)
    directions = itertools.compress(get_args(Direction), looks)
    stripes = Stripes(grids, widths, tuple(directions))
  if 'kept' in told:
    shares = told['kept'].astype(np.float64)
  shown = _both_ends(told['stripe'][0] if shares is None else shares[0])
  if shares is not None:
    regions = KeptRegions(told['cut'], shares, _as_mask(told['blocks'][shown]))
  return SparseMap(
    tuple(examples.asking(int(i)) for i in indices[shown]),
    shown,
    stripes,
    regions,
  )


def _decisions(out: Any) -> dict[str, jax.Array]:
  """What the mixers of a model tell; choices of regions at the finest level."""
  told = out.get('aux', {}).get('msw', {})
  found: dict[str, jax.Array] = {}
  of_stripes = 'stripe', 'grid', 'heads'
  if {*of_stripes} <= set(told):
    found |= {name: told[name] for name in of_stripes}
  if {'blocks', 'cut', 'kept'} <= set(told):
    found |= {name: told[name] for name in ('cut', 'kept')}
    found['blocks'] = told['blocks'][0]
  return found


def _both_ends(values: np.ndarray) -> Int[np.ndarray, ' p']:
  """Places of the smallest and of the largest values, ascending."""
  order = np.argsort(values, kind='stable')
  if len(order) <= 2 * _EACH:
    return order
  return np.concatenate([order[:_EACH], order[-_EACH:]])


def _as_mask(
  blocks: Int[np.ndarray, 'p h i k'],
) -> Bool[np.ndarray, 'p h i i']:
  """Kept regions as a mask: True where region i names region j."""
  mask = np.zeros((*blocks.shape[:-1], blocks.shape[-2] + 1), bool)
  # What names no region, −1, names the last column, which is cut off.
  np.put_along_axis(mask, blocks, True, axis=-1)
  return mask[..., :-1]
