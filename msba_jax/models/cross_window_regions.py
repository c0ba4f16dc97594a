"""The stage of NEXUS in the place of MSW: grids mixed, then cut to regions.

Attributes:
  CrossWindowRegions: the stage.
  Mixer: makes an attention module over a grid.
  GridAttention: dense self-attention of a grid, for comparison.
"""

import itertools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.layers.attention import attend
from msba_jax.layers.pooling import generalized_mean_windows
from msba_jax.layers.windows import partition_windows
from msba_jax.models.blocks import (
  Attend,
  FeedForward,
  KeyProjection,
  TokenAttention,
  positive_parameter,
)

__all__ = ['CrossWindowRegions', 'GridAttention', 'Mixer']

# Called as mixer(name=…): a module from normalised tokens (n, y, x, d) to
# (messages of the same shape, what it tells of itself).
Mixer = Callable[..., nn.Module]
Told = Array | tuple[Array, ...]


class CrossWindowRegions(nn.Module):
  """Attention over every grid, and the same regions of each.

      x = W grid;  x = x + Σ mixer(norm(x)) over mixers;  x = x + FFN(norm(x))
      regions = norm(generalised means of x over p × p windows)

  All grids are resized to one, so that the regions of a place follow each other
  over the levels; a backbone with one grid gives further scales by averages.

  Attributes:
    features: width of a region.
    mixers: attention modules of a level, side by side.
    parts: regions along a side.
    scales: of each grid; 2 is a grid of half the size.
    ratio: width of the feed-forward over that of a token.
  """

  features: int
  mixers: Sequence[Mixer]
  parts: int = 4
  scales: Sequence[int] = (1,)
  ratio: int = 2

  @nn.compact
  def __call__(
    self, levels: Sequence[Float[Array, 'n _ _ _']]
  ) -> tuple[Float[Array, 'l n r d'], dict[str, Told]]:
    """Makes regions of grids.

    Args:
      levels: grids, fine to coarse.

    Returns:
      The regions of every level and scale, fine to coarse; what the mixers
      tell, stacked over the levels that tell it where the shapes agree and as a
      tuple elsewhere.
    """
    grids = [_coarser(grid, scale) for grid in levels for scale in self.scales]
    regions, told = zip(
      *(
        CrossWindowLevel(
          self.features,
          tuple(self.mixers),
          self.parts,
          self.ratio,
          name=f'level_{i}',
        )(grid)
        for i, grid in enumerate(grids)
      ),
      strict=True,
    )
    names = dict.fromkeys(itertools.chain(*told))
    aux = {
      name: _stacked([of_level[name] for of_level in told if name in of_level])
      for name in names
    }
    return jnp.stack(regions), aux


class CrossWindowLevel(nn.Module):
  """One grid of `CrossWindowRegions`: (n, y, x, _) to (n, r, d).

  Attributes:
    features: d.
    mixers: attention modules.
    parts: regions along a side.
    ratio: width of the feed-forward over that of a token.
  """

  features: int
  mixers: tuple[Mixer, ...]
  parts: int
  ratio: int

  @nn.compact
  def __call__(self, grid: Array) -> tuple[Array, dict[str, Array]]:
    """Regions, and what the mixers tell."""
    n, height, width, _ = grid.shape
    tokens = nn.Dense(self.features, name='project')(grid)
    aux, normal = {}, nn.LayerNorm(name='norm_mixers')(tokens)
    for i, mixer in enumerate(self.mixers):
      messages, told = mixer(name=f'mixer_{i}')(normal)
      tokens = tokens + messages
      aux |= told
    normal = nn.LayerNorm(name='norm_feed_forward')(tokens)
    tokens = tokens + FeedForward(
      self.ratio * self.features, name='feed_forward'
    )(normal)
    pooled = generalized_mean_windows(
      tokens.reshape(n, height * width, self.features),
      [partition_windows(height, width, parts=self.parts)],
      positive_parameter(self, 'power', 3.0),
    )
    return nn.LayerNorm(name='norm_regions')(pooled), aux


class GridAttention(nn.Module):
  """Every token of a grid looks at every other.

  Attributes:
    num_heads: number of heads.
    attend: the attention function.
    keys: makes the module of the keys; None is a plain projection.
  """

  num_heads: int = 8
  attend: Attend = attend
  keys: KeyProjection | None = None

  @nn.compact
  def __call__(
    self, grid: Float[Array, 'n y x d']
  ) -> tuple[Float[Array, 'n y x d'], dict[str, Array]]:
    """Messages for every token; nothing to tell."""
    n, height, width, features = grid.shape
    messages = TokenAttention(
      self.num_heads,
      self.attend,
      keys=self.keys,
      grid=(height, width),
      name='attention',
    )(grid.reshape(n, height * width, features))
    return messages.reshape(grid.shape), {}


def _coarser(grid: Array, scale: int) -> Array:
  if scale == 1:
    return grid
  return nn.avg_pool(grid, (scale, scale), (scale, scale), padding='SAME')


def _stacked(parts: list[Array]) -> Told:
  if len({part.shape for part in parts}) == 1:
    return jnp.stack(parts)
  return tuple(parts)
