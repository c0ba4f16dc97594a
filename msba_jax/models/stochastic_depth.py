"""Stochastic depth: residual branches that are left out at random in training.

Attributes:
  drop_rates: how probably the branches of each block are left out.
  drop_branch: a branch, left out for some of the images.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

__all__ = ['drop_branch', 'drop_rates']


def drop_rates(
  rate: float, blocks: int, *, train: bool
) -> Float32[Array, ' blocks'] | list[None]:
  """How probably the branches of each block are left out: from 0 to `rate`.

  Args:
    rate: of the last block.
    blocks: how many.
    train: whether any are left out at all.

  Returns:
    What `drop_branch` takes, for each block.

  Raises:
    ValueError: the rate is not in [0, 1).

  Source: Deep Networks with Stochastic Depth (2016), arXiv 1603.09382.
  """
  if not 0 <= rate < 1:
    raise ValueError(f'stochastic_depth={rate} must be in [0, 1)')
  if not train or not rate:
    return [None] * blocks
  return jnp.linspace(0, rate, blocks, dtype=jnp.float32)


def drop_branch(
  module: nn.Module, branch: Array, rate: Float32[Array, ''] | None
) -> Array:
  """A residual branch, left out for some of the images.

  Where it stays it counts 1 / (1 - rate)-fold, so that its mean is the branch.

  Args:
    module: has a key 'dropout', if there is a rate.
    branch: (n, …).
    rate: how probably the branch of an image is zero; None leaves out none.

  Returns:
    An array of the same shape.
  """
  if rate is None:
    return branch
  shape = branch.shape[:1] + (1,) * (branch.ndim - 1)
  stays = jax.random.bernoulli(module.make_rng('dropout'), 1 - rate, shape)
  return branch * (stays / (1 - rate)).astype(branch.dtype)
