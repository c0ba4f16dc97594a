"""MMFuser: a deep layer asks, shallow layers of the same grid answer.

Attributes:
  MMFuser: fuses the layers of a backbone into one grid.
  FusedBackbone: a backbone whose last grid is the fused one.
  DeformableAttention: attention to a few points of every layer.
  SoftmaxAttention: attention to all tokens of all layers.
  token_grid: the grid of tokens, and whether layers fit together.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.layers.attention import attend
from msba_jax.layers.deformable import (
  deformable_attention,
  patch_centres,
  ring_offsets,
)
from msba_jax.models.blocks import Images, split_heads

__all__ = [
  'DeformableAttention',
  'FusedBackbone',
  'MMFuser',
  'SoftmaxAttention',
  'token_grid',
]

Attention = Literal['deformable', 'softmax']


class MMFuser(nn.Module):
  """The deep layer, and what it reads from shallow ones.

      cross = attention(norm(deep), norm(shallow layers))
      inner = cross + γ_self ∘ attention(norm(cross), norm(cross))
      fused = deep + γ ∘ inner

  Both γ are vectors that begin at zero by default: at first the result is the
  deep layer exactly, and only γ has a gradient. In a short training of the
  fuser alone they hardly leave zero.

  Attributes:
    num_heads: number of heads.
    num_points: points of a head at a layer, of deformable attention.
    attention: 'softmax' looks at all tokens instead of a few points.
    self_attention: False leaves inner = cross.
    scale: γ and γ_self at first.

  Source: MMFuser: Multimodal Multi-Layer Feature Fuser for Fine-Grained
  Vision-Language Understanding (2024), arXiv 2410.11829.
  """

  num_heads: int = 16
  num_points: int = 4
  attention: Attention = 'deformable'
  self_attention: bool = True
  scale: float = 0.0

  @nn.compact
  def __call__(
    self,
    layers: Sequence[Float[Array, 'n t d']],
    *,
    grid: tuple[int, int] | None = None,
  ) -> Float[Array, 'n t d']:
    """Fuses layers, shallow ones first and the deep one last.

    Args:
      layers: tokens of one grid, row by row, without class token.
      grid: rows and columns; None is square.

    Returns:
      Tokens in the dtype of the deep layer.

    Raises:
      ValueError: no shallow layer, layers or grid do not fit together, the
        heads do not divide the features, or there is no such attention.
    """
    grid = token_grid(layers, grid)
    *shallow, deep = layers
    if not shallow:
      raise ValueError('at least one shallow layer must stand before the deep')
    if self.attention not in get_args(Attention):
      raise ValueError(
        f'{self.attention=} must be one of {get_args(Attention)}'
      )
    read_norm = nn.LayerNorm(name='norm_shallow')
    fused = self._attend(
      nn.LayerNorm(name='norm_deep')(deep),
      [read_norm(layer) for layer in shallow],
      grid,
      'cross',
    )
    d = deep.shape[-1]
    begin = nn.initializers.constant(self.scale)
    if self.self_attention:
      normed = nn.LayerNorm(name='norm_self')(fused)
      inner = self._attend(normed, [normed], grid, 'self')
      scale = self.param('scale_self', begin, (d,))
      fused = fused + scale[None, None] * inner
    scale = self.param('scale', begin, (d,))
    return (deep + scale[None, None] * fused).astype(deep.dtype)

  def _attend(
    self,
    queries: Array,
    values: Sequence[Array],
    grid: tuple[int, int],
    name: str,
  ) -> Array:
    if self.attention == 'softmax':
      return SoftmaxAttention(self.num_heads, name=name)(queries, values)
    return DeformableAttention(self.num_heads, self.num_points, name=name)(
      queries, values, grid=grid
    )


class DeformableAttention(nn.Module):
  """Every token reads points around its own place in every layer.

  Offsets and weights are linear in the queries; at first they do not depend on
  them: every head reads in its own direction, all points alike.

  Attributes:
    num_heads: number of heads.
    num_points: points of a head at a layer.

  Source: Deformable DETR (2020), arXiv 2010.04159.
  """

  num_heads: int = 16
  num_points: int = 4

  @nn.compact
  def __call__(
    self,
    queries: Float[Array, 'n t d'],
    values: Sequence[Float[Array, 'n t d']],
    *,
    grid: tuple[int, int],
  ) -> Float[Array, 'n t d']:
    """Messages; queries and every layer of values stand on the grid."""
    n, t, d = queries.shape
    height, width = grid
    points = self.num_heads, len(values), self.num_points
    project = nn.Dense(d, name='values')
    levels = [
      split_heads(project(layer), self.num_heads).reshape(
        n, height, width, self.num_heads, -1
      )
      for layer in values
    ]
    offsets = nn.Dense(
      2 * math.prod(points),
      kernel_init=nn.initializers.zeros,
      bias_init=lambda _, shape, dtype=jnp.float32: jnp.asarray(
        ring_offsets(*points), dtype
      ).reshape(shape),
      name='offsets',
    )(queries).reshape(n, t, *points, 2)
    weights = nn.Dense(
      math.prod(points), kernel_init=nn.initializers.zeros, name='weights'
    )(queries).reshape(n, t, *points)
    weights = jax.nn.softmax(weights.astype(jnp.float32), axis=(-2, -1))
    size = jnp.array([width, height], jnp.float32).reshape(1, 1, 1, 1, 1, 2)
    centres = jnp.asarray(patch_centres(height, width))
    locations = centres.reshape(1, t, 1, 1, 1, 2) + offsets / size
    messages = deformable_attention(levels, locations, weights)
    return nn.Dense(d, name='out')(messages.reshape(n, t, d))


class SoftmaxAttention(nn.Module):
  """Every token looks at all tokens of all layers.

  Attributes:
    num_heads: number of heads.
  """

  num_heads: int = 16

  @nn.compact
  def __call__(
    self,
    queries: Float[Array, 'n t d'],
    values: Sequence[Float[Array, 'n t d']],
  ) -> Float[Array, 'n t d']:
    """Messages to every query."""
    d = queries.shape[-1]
    read = nn.Dense(2 * d, name='keys_values')(jnp.concatenate(values, axis=1))
    asked = nn.Dense(d, name='queries')(queries)
    messages = attend(
      *(
        split_heads(x, self.num_heads)
        for x in (asked, *jnp.split(read, 2, axis=-1))
      )
    )
    return nn.Dense(d, name='out')(messages.reshape(queries.shape))


class FusedBackbone(nn.Module):
  """A backbone whose grids are fused before the next stage sees them.

  Attributes:
    backbone: images to grids of one size and width, shallow to deep.
    fuser: `MMFuser` or one of `fusion_baselines`.
    keep_levels: the fused grid takes the place of the last and the others stay;
      otherwise it is the only one.
  """

  backbone: nn.Module
  fuser: nn.Module
  keep_levels: bool = False

  def __call__(
    self, images: Images, *, train: bool = False
  ) -> tuple[Float[Array, 'n y x d'], ...]:
    """Returns the grids.

    Raises:
      ValueError: sizes or widths of the backbone's grids differ.
    """
    levels = self.backbone(images, train=train)
    shapes = [level.shape for level in levels]
    if len(set(shapes)) > 1:
      raise ValueError(
        f'grids to be fused must be of one size and width: {shapes}'
      )
    n, height, width, d = shapes[-1]
    tokens = [level.reshape(n, height * width, d) for level in levels]
    fused = self.fuser(tokens, grid=(height, width)).reshape(shapes[-1])
    return (*levels[:-1], fused) if self.keep_levels else (fused,)


def token_grid(
  layers: Sequence[Float[Array, 'n t d']], grid: tuple[int, int] | None
) -> tuple[int, int]:
  """Rows and columns of the tokens of layers; None is square.

  Raises:
    ValueError: there is no layer, shapes differ, or the grid does not hold the
      tokens.
  """
  shapes = [layer.shape for layer in layers]
  if len(set(shapes)) != 1 or len(shapes[0]) != 3:
    raise ValueError(f'layers must be (n, t, d), all of one shape: {shapes}')
  tokens = shapes[0][1]
  if grid is None:
    side = math.isqrt(tokens)
    if side * side != tokens:
      raise ValueError(
        f'{tokens} tokens are no square: drop class tokens, or name the grid'
      )
    return side, side
  if grid[0] * grid[1] != tokens:
    raise ValueError(f'{grid=} does not hold {tokens} tokens')
  return grid
