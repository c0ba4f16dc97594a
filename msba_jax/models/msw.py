"""MSW, multi-scale sliding windows: grids of a backbone to regions.

Attributes:
  MultiScaleWindows: the stage.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.layers.attention import attend
from msba_jax.layers.pooling import generalized_mean_windows, region_partition
from msba_jax.layers.windows import Windows, window_partition
from msba_jax.models.blocks import (
  KeyProjection,
  positive_parameter,
  queries_keys_values,
  split_heads,
)

__all__ = ['MultiScaleWindows']


class MultiScaleWindows(nn.Module):
  """Windowed self-attention and pooling at every level and scale.

  For each partition of the grid into windows, a window is pooled to one region
  by a generalised mean with a learned power, at the width of the backbone, and
  projected to the one width of all levels; to it is added the mean message of
  the attention among the tokens of the window. The default partitions, whole
  map, 2 × 2 and 3 × 3, give 14 regions at each level, whatever the grid.

  Attributes:
    features: width of a region.
    num_heads: heads of the attention inside windows.
    parts: partitions of the grid.
    attend: the attention function.
    keys: makes the module of the keys; None is a plain projection.
  """

  features: int = 64
  num_heads: int = 4
  parts: Sequence[int] = (1, 2, 3)
  attend: Callable[..., Array] = attend
  keys: KeyProjection | None = None

  @nn.compact
  def __call__(
    self, levels: Sequence[Float[Array, 'n _ _ _']]
  ) -> tuple[Float[Array, 'l n r d'], dict[str, Array]]:
    """Returns the regions, and the powers of the pooling as auxiliary."""
    regions = [
      WindowedLevel(
        self.features,
        self.num_heads,
        tuple(self.parts),
        self.attend,
        self.keys,
        name=f'level_{i}',
      )(grid)
      for i, grid in enumerate(levels)
    ]
    return jnp.stack(regions), {}


class WindowedLevel(nn.Module):
  """One level of `MultiScaleWindows`: (n, y, x, _) to (n, r, d).

  Queries, keys and values are shared by all partitions.

  Attributes:
    features: width of a region.
    num_heads: heads of the attention.
    parts: partitions of the grid.
    attend: the attention function.
    keys: makes the module of the keys; None is a plain projection.
  """

  features: int
  num_heads: int
  parts: tuple[int, ...]
  attend: Callable[..., Array] = attend
  keys: KeyProjection | None = None

  @nn.compact
  def __call__(self, grid: Array) -> Array:
    """(n, y, x, _) to (n, r, features)."""
    n, height, width, channels = grid.shape
    grid = grid.reshape(n, height * width, channels)
    project = nn.Dense(self.features, name='project')
    projected = queries_keys_values(
      nn.LayerNorm(name='norm')(project(grid)),
      self.features,
      self.keys,
      grid=(height, width),
    )
    projected = jnp.concatenate(projected, axis=-1)
    partition = region_partition(height, width, parts=self.parts)
    messages = jnp.concatenate(
      [self._inside(projected, windows) for windows in partition], axis=1
    )
    power = positive_parameter(self, 'power', 3.0)
    pooled = nn.LayerNorm(name='norm_pooled')(
      generalized_mean_windows(grid, partition, power)
    )
    message = nn.Dense(self.features, name='out')(messages)
    return nn.LayerNorm(name='norm_regions')(project(pooled) + message)

  def _inside(self, projected: Array, windows: Windows) -> Array:
    """Mean message inside every window: (n, t, 3 d) to (n, w, d)."""
    parts = window_partition(projected, windows)
    queries, keys, values = (
      split_heads(x, self.num_heads) for x in jnp.split(parts, 3, axis=-1)
    )
    mask = None
    if not windows.valid.all():
      mask = jnp.asarray(windows.valid)[None, :, None, None, :]
    message = self.attend(queries, keys, values, mask=mask)
    message = message.reshape(*parts.shape[:-1], self.features)
    share = windows.valid / windows.valid.sum(axis=1, keepdims=True)
    return jnp.einsum('ws,nwsd->nwd', jnp.asarray(share, 'f4'), message)
