"""The projection of tokens to keys on an atlas, in place of one dense layer.

Attributes:
  ManifoldKeys: the module.
  activation_gain: what an activation takes from the spread of its input.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from msba_jax.layers.manifold import (
  ManifoldParams,
  Variant,
  manifold_keys,
  membership_penalty,
)
from msba_jax.models.blocks import small_init

__all__ = ['ManifoldKeys', 'activation_gain']

Budget = Literal['equal', 'full']
Init = nn.initializers.Initializer
map_init = nn.initializers.lecun_normal(batch_axis=(0,))


class ManifoldKeys(nn.Module):
  """Keys of one image's tokens, or of tokens of many images in one axis.

  With the equal budget the chart maps have as many weights as a dense layer
  would: charts of 'vanilla' are features / charts wide and stand side by side;
  the others have factors, of the largest rank that is not above the budget (d /
  (2 · charts) for d features in and out). With the full budget a chart is as
  wide as the keys, and 'vanilla' projects all of them back.

  Keys begin with the spread over tokens that those of `nn.Dense` begin with:
  chart maps are its LeCun normal times a gain that makes up for the activation
  and for the mean of so many charts. Memberships begin nearly uniform, scales
  as 1 + N(0, 0.02²), biases as zero.

  Memberships are sown as 'memberships' into the collection 'intermediates', the
  mean penalty of 'unbalanced_atlas' as 'membership' into 'penalties'; add it to
  the loss.

  Attributes:
    features: size of a key.
    variant: how charts become a key.
    charts: their number.
    budget: 'equal' to a dense layer, or 'full'.
    activation: of the charts; None is the identity.
    grid: height and width of the tokens after the prefix, for 'spatial' only.
    prefix: number of tokens before the grid.
    broadcast_context: first adds the mean of the tokens.
    penalty: weight of the penalty of 'unbalanced_atlas'; −0.1 is the source's,
      0 is none and was measured to be better.

  Source: our reconstruction of A Manifold Representation of the Key in Vision
  Transformers (2024), arXiv 2402.00534.
  """

  features: int
  variant: Variant = 'vanilla'
  charts: int = 8
  budget: Budget = 'equal'
  activation: Callable[[Array], Array] | None = jax.nn.gelu
  grid: tuple[int, int] | None = None
  prefix: int = 0
  broadcast_context: bool = False
  penalty: float = -0.1

  @nn.compact
  def __call__(
    self, inputs: Float[Array, '*b t d']
  ) -> Float[Array, '*b t features']:
    """Returns the keys in the dtype of the inputs.

    Raises:
      ValueError: an unknown budget, or one that these charts do not fit; what
        `manifold_keys` raises.
    """
    # Whoever makes the module tells of the grid, whatever the variant.
    spatial = self.variant == 'spatial'
    found = manifold_keys(
      inputs,
      self._params(inputs.shape[-1]),
      variant=self.variant,
      activation=self.activation,
      grid=self.grid if spatial else None,
      prefix=self.prefix if spatial else 0,
      broadcast_context=self.broadcast_context,
    )
    # What is sown while parameters are made would stay with them.
    if found.memberships is not None and not self.is_initializing():
      self.sow('intermediates', 'memberships', found.memberships)
      if self.variant == 'unbalanced_atlas' and self.penalty:
        penalty = membership_penalty(found.memberships, weight=self.penalty)
        self.sow('penalties', 'membership', jnp.mean(penalty))
    return found.keys

  def _params(self, d: int) -> ManifoldParams:
    """The parameters of the variant and the budget for d features."""
    if self.budget not in get_args(Budget) or self.charts < 1:
      raise ValueError(
        f'{self.budget=} must be one of {get_args(Budget)}, and {self.charts=} '
        'positive'
      )
    count, joined = self.charts, self.variant == 'vanilla'
    width, rank = self.features, None
    if self.budget == 'equal' and joined:
      if width % count:
        raise ValueError(f'{self.charts=} must divide {self.features=}')
      width //= count
    elif self.budget == 'equal':
      rank = d * width // (count * (d + width))
      if not rank:
        raise ValueError(
          f'{self.charts=} are too many for {d} features and {self.features=}'
        )
    last_map = functools.partial(
      _scaled_map, self.activation, 1 if joined else count
    )

    def optional(name: str, init: Init, shape: tuple, wanted: bool):
      return self.param(name, init, shape) if wanted else None

    first_map = last_map if rank is None else map_init
    return ManifoldParams(
      scales=self.param('scales', _near_one, (count, d)),
      charts=self.param('charts', first_map, (count, d, rank or width)),
      biases=self.param('biases', nn.initializers.zeros, (count, width)),
      factors=optional(
        'factors', last_map, (count, rank, width), rank is not None
      ),
      output=optional(
        'output',
        nn.initializers.lecun_normal(),
        (count * width, self.features),
        joined and self.budget == 'full',
      ),
      membership=optional(
        'membership',
        small_init,
        (d, count),
        self.variant in ('unbalanced_atlas', 'spatial'),
      ),
      kernel=optional(
        'kernel',
        nn.initializers.lecun_normal(),
        (3, 3, count),
        self.variant == 'spatial',
      ),
    )


def activation_gain(activation: Callable[[Array], Array] | None) -> Array:
  """1 / std φ(z) for a standard normal z.

  A layer with this factor before a rectifier keeps the spread of its inputs;
  GELU is so near to one that less than 3 % is missing.

  Args:
    activation: φ; None is the identity.

  Returns:
    A float32 scalar.
  """
  nodes, weights = np.polynomial.hermite_e.hermegauss(64)
  shares = jnp.asarray(weights / weights.sum(), jnp.float32)
  values = (activation or jax.nn.identity)(jnp.asarray(nodes, jnp.float32))
  mean = jnp.sum(shares * values)
  return 1 / jnp.sqrt(jnp.sum(shares * (values - mean) ** 2))


def _scaled_map(
  activation: Callable[[Array], Array] | None,
  averaged: int,
  key: Array,
  shape: tuple[int, ...],
  dtype: DTypeLike = jnp.float32,
) -> Array:
  """Chart maps before an activation and a mean of so many charts."""
  gain = activation_gain(activation) * math.sqrt(averaged)
  return gain.astype(dtype) * map_init(key, shape, dtype)


def _near_one(
  key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> Array:
  return 1 + 0.02 * jax.random.normal(key, shape, dtype)
