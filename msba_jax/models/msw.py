"""MSW, multi-scale sliding windows: grids of a backbone to regions.

Attributes:
  MultiScaleWindows: the stage.
  JoinedHeads: regions of pooled windows and messages that were kept apart.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msba_jax.layers.attention import attend, attention_weights
from msba_jax.layers.heads import prompt_alignment, tokens_of_masks
from msba_jax.layers.pooling import generalized_mean_windows, region_partition
from msba_jax.layers.windows import Windows, window_partition
from msba_jax.models.blocks import (
  KeyProjection,
  positive_parameter,
  queries_keys_values,
  split_heads,
)

__all__ = ['JoinedHeads', 'MultiScaleWindows']


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
    apart: gives the pooled window and the messages of the heads side by side,
      of twice the width, so that `JoinedHeads` can choose among the heads when
      more is known.
  """

  features: int = 64
  num_heads: int = 4
  parts: Sequence[int] = (1, 2, 3)
  attend: Callable[..., Array] = attend
  keys: KeyProjection | None = None
  apart: bool = False

  @nn.compact
  def __call__(
    self,
    levels: Sequence[Float[Array, 'n _ _ _']],
    *,
    prompt: Bool[Array, 'n _ _'] | None = None,
  ) -> tuple[Float[Array, 'l n r d'], dict[str, Array]]:
    """Makes regions of grids.

    Args:
      levels: grids, fine to coarse.
      prompt: a mask over each image, of any size.

    Returns:
      The regions, and with a prompt `prompt` (n, h): how much of the attention
      of each head lies inside of it, the mean over levels.
    """
    regions, inside = zip(
      *(
        WindowedLevel(
          self.features,
          self.num_heads,
          tuple(self.parts),
          self.attend,
          self.keys,
          self.apart,
          name=f'level_{i}',
        )(grid, prompt)
        for i, grid in enumerate(levels)
      ),
      strict=True,
    )
    if prompt is None:
      return jnp.stack(regions), {}
    return jnp.stack(regions), {'prompt': jnp.mean(jnp.stack(inside), axis=0)}


class WindowedLevel(nn.Module):
  """One level of `MultiScaleWindows`: (n, y, x, _) to (n, r, d).

  Queries, keys and values are shared by all partitions.

  Attributes:
    features: width of a region.
    num_heads: heads of the attention.
    parts: partitions of the grid.
    attend: the attention function.
    keys: makes the module of the keys; None is a plain projection.
    apart: gives pooled windows and messages side by side.
  """

  features: int
  num_heads: int
  parts: tuple[int, ...]
  attend: Callable[..., Array] = attend
  keys: KeyProjection | None = None
  apart: bool = False

  @nn.compact
  def __call__(
    self, grid: Array, prompt: Array | None = None
  ) -> tuple[Array, Array | None]:
    """Regions (n, r, features), and how heads look at a prompt, (n, h)."""
    n, height, width, channels = grid.shape
    grid = grid.reshape(n, height * width, channels)
    project = nn.Dense(self.features, name='project')
    projected = queries_keys_values(
      nn.LayerNorm(name='norm')(project(grid)),
      self.features,
      self.keys,
      grid=(height, width),
    )
    looks = None
    if prompt is not None:
      tokens = tokens_of_masks(prompt, (height, width))
      asking, answering = (
        split_heads(x, self.num_heads) for x in projected[:2]
      )
      looks = prompt_alignment(attention_weights(asking, answering), tokens)
    projected = jnp.concatenate(projected, axis=-1)
    partition = region_partition(height, width, parts=self.parts)
    messages = jnp.concatenate(
      [self._inside(projected, windows) for windows in partition], axis=1
    )
    power = positive_parameter(self, 'power', 3.0)
    pooled = nn.LayerNorm(name='norm_pooled')(
      generalized_mean_windows(grid, partition, power)
    )
    if self.apart:
      return jnp.concatenate([project(pooled), messages], axis=-1), looks
    message = nn.Dense(self.features, name='out')(messages)
    regions = nn.LayerNorm(name='norm_regions')(project(pooled) + message)
    return regions, looks

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


class JoinedHeads(nn.Module):
  """The last layers of `MultiScaleWindows`, when it keeps its parts apart.

      region = norm(pooled + W (factors ∘ heads))

  With factors of one it is what `MultiScaleWindows` gives by itself.

  Attributes:
    num_heads: as in `MultiScaleWindows`.
  """

  num_heads: int = 4

  @nn.compact
  def __call__(
    self,
    parts: Float[Array, 'l n r _'],
    factors: Float[Array, 'n h'] | None = None,
  ) -> Float[Array, 'l n r d']:
    """Regions of parts, with some heads of each image stronger than others."""
    pooled, messages = jnp.split(parts, 2, axis=-1)
    if factors is not None:
      heads = split_heads(messages, self.num_heads)
      weights = factors[None, :, None, :, None].astype(heads.dtype)
      messages = (heads * weights).reshape(messages.shape)
    return jnp.stack(
      [
        nn.LayerNorm(name=f'norm_{i}')(
          level + nn.Dense(level.shape[-1], name=f'out_{i}')(message)
        )
        for i, (level, message) in enumerate(zip(pooled, messages, strict=True))
      ]
    )
