"""A backbone whose grids were computed before.

Attributes:
  Precomputed: passes the pyramid through.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ['Precomputed']


class Precomputed(nn.Module):
  """Takes the pyramid of a frozen backbone in place of images."""

  @nn.compact
  def __call__(
    self, images: Sequence[Float[Array, 'n _ _ _']], *, train: bool = False
  ) -> tuple[Float[Array, 'n _ _ _'], ...]:
    """Returns the same grids in float32."""
    return tuple(grid.astype(jnp.float32) for grid in images)
