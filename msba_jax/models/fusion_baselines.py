"""Plain ways to fuse layers of one grid, called as `MMFuser` is.

Each takes tokens of layers (n, t, d), shallow ones first and the deep one last,
and `grid` (rows and columns; None is square), and returns (n, t, d).

Attributes:
  ConcatFuser: layers side by side, projected back.
  AverageFuser: their mean.
  WeightedFuser: a mean with learned weights.
  PyramidFuser: the top-down sum of a feature pyramid.
  SumFuser: their sum.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.models.mmfuser import token_grid

__all__ = [
  'AverageFuser',
  'ConcatFuser',
  'PyramidFuser',
  'SumFuser',
  'WeightedFuser',
]

Layers = Sequence[Float[Array, 'n t d']]
Grid = tuple[int, int] | None


class ConcatFuser(nn.Module):
  """W [layers] + b: all features of a token, projected back to d."""

  @nn.compact
  def __call__(
    self, layers: Layers, *, grid: Grid = None
  ) -> Float[Array, 'n t d']:
    """Fuses layers."""
    token_grid(layers, grid)
    joint = jnp.concatenate(layers, axis=-1)
    return nn.Dense(layers[-1].shape[-1], name='out')(joint)


class AverageFuser(nn.Module):
  """The mean of the layers; without parameters."""

  def __call__(
    self, layers: Layers, *, grid: Grid = None
  ) -> Float[Array, 'n t d']:
    """Fuses layers."""
    token_grid(layers, grid)
    return jnp.mean(jnp.stack(layers), axis=0)


class WeightedFuser(nn.Module):
  """Σ_l softmax(w)_l layer_l: learned weights, at first all alike."""

  @nn.compact
  def __call__(
    self, layers: Layers, *, grid: Grid = None
  ) -> Float[Array, 'n t d']:
    """Fuses layers."""
    token_grid(layers, grid)
    weights = self.param('weights', nn.initializers.zeros, (len(layers),))
    return jnp.einsum('l,lntd->ntd', jax.nn.softmax(weights), jnp.stack(layers))


class PyramidFuser(nn.Module):
  """A feature pyramid's finest level: laterals added top-down, then smoothed.

  As all layers have one size, nothing is enlarged on the way down.

  Source: Feature Pyramid Networks for Object Detection (2017), arXiv
  1612.03144.
  """

  @nn.compact
  def __call__(
    self, layers: Layers, *, grid: Grid = None
  ) -> Float[Array, 'n t d']:
    """Fuses layers."""
    height, width = token_grid(layers, grid)
    n, _, d = layers[-1].shape
    total = jnp.zeros((), layers[-1].dtype)
    for i, layer in reversed(list(enumerate(layers))):
      total = total + nn.Dense(d, name=f'lateral_{i}')(layer)
    total = total.reshape(n, height, width, d)
    return nn.Conv(d, (3, 3), name='smooth')(total).reshape(n, -1, d)


class SumFuser(nn.Module):
  """The sum of the layers; without parameters."""

  def __call__(
    self, layers: Layers, *, grid: Grid = None
  ) -> Float[Array, 'n t d']:
    """Fuses layers."""
    token_grid(layers, grid)
    return jnp.sum(jnp.stack(layers), axis=0)
