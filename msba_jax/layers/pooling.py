"""Pooling of tokens to regions.

Attributes:
  generalized_mean_pool: GeM over an axis, defined for every real number.
  generalized_mean_windows: the same of every window of a grid, cheaper.
  region_partition: the index maps of the default regions of an image.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from msba_jax.layers.windows import Windows, partition_windows

__all__ = [
  'generalized_mean_pool',
  'generalized_mean_windows',
  'region_partition',
]


def generalized_mean_pool(
  inputs: Float[Array, '*b t d'],
  power: Float[Array, '...'] | float = 3.0,
  *,
  mask: Bool[Array, '*b t'] | None = None,
  epsilon: float = 1e-6,
) -> Float[Array, '*b d']:
  r"""Generalised mean of softplus(x): (mean_t (softplus(x_t) + ε)ᵖ)^(1/p).

  Powers of negative tokens are NaN and clamping them kills their gradient; the
  softplus is positive and smooth. Computed through logarithms in float32, so
  that large powers neither overflow nor vanish.

  Args:
    inputs: tokens of any sign.
    power: p, positive; 1 is the mean, ∞ the maximum. A scalar, or one a
      feature.
    mask: True takes part.
    epsilon: added to the softplus.

  Returns:
    One positive vector in the dtype of the inputs; zero where no token takes
    part.

  Example:
    >>> pooled = generalized_mean_pool(jnp.array([[2.0], [2.0]]), 3.0)
    >>> bool(jnp.isclose(pooled[0], jax.nn.softplus(2.0), atol=1e-5))
    True

  Source: Fine-tuning CNN Image Retrieval with No Human Annotation (2017), arXiv
  1711.02512; the softplus is ours.
  """
  scaled, power = _scaled_logs(inputs, power, epsilon)
  if mask is None:
    total = jax.nn.logsumexp(scaled, axis=-2) - jnp.log(inputs.shape[-2])
    return _root(total, power).astype(inputs.dtype)
  mask = mask[..., None]
  count = jnp.sum(mask, axis=-2)
  alive = count > 0
  # An empty row keeps one token in the sum, so that its gradient is no NaN.
  total = jax.nn.logsumexp(
    scaled, axis=-2, where=mask | ~alive[..., None, :]
  ) - jnp.log(jnp.maximum(count, 1).astype(jnp.float32))
  return jnp.where(alive, _root(total, power), 0).astype(inputs.dtype)


def generalized_mean_windows(
  inputs: Float[Array, '*b t d'],
  windows: Sequence[Windows],
  power: Float[Array, '...'] | float = 3.0,
  *,
  epsilon: float = 1e-6,
) -> Float[Array, '*b w d']:
  r"""`generalized_mean_pool` of every window of a grid.

  Powers are taken once a token, however many windows it is in, and a window is
  a row of one matrix product. They are relative to the largest of an image and
  feature: where (smallest / largest)ᵖ of the softplus falls below 1e-30, a
  window of only such tokens gives that bound in place of its mean.

  Args:
    inputs: tokens of a grid, row-major.
    windows: index maps of this grid; their windows follow each other.
    power: p, positive, a scalar or one a feature.
    epsilon: added to the softplus.

  Returns:
    One positive vector a window in the dtype of the inputs.

  Raises:
    ValueError: a window is of another grid.

  Example:
    >>> grid = jnp.array([[2.0], [2.0], [0.0], [0.0]])
    >>> pooled = generalized_mean_windows(grid, region_partition(2, 2))
    >>> bool(jnp.isclose(pooled[1, 0], jax.nn.softplus(2.0), atol=1e-5))
    True
  """
  if any(part.tokens != inputs.shape[-2] for part in windows):
    raise ValueError(
      f'windows of {[part.tokens for part in windows]} tokens do not fit '
      f'{inputs.shape=}'
    )
  scaled, power = _scaled_logs(inputs, power, epsilon)
  peak = jax.lax.stop_gradient(jnp.max(scaled, axis=-2, keepdims=True))
  means = jnp.einsum(
    'wt,...td->...wd', _window_means(windows), jnp.exp(scaled - peak)
  )
  return _root(jnp.log(means + 1e-30) + peak, power).astype(inputs.dtype)


def region_partition(
  height: int, width: int, *, parts: Sequence[int] = (1, 2, 3)
) -> tuple[Windows, ...]:
  """Windows of every region: the whole map, then its p × p partitions.

  Args:
    height: rows of the grid.
    width: columns of the grid.
    parts: the partitions; the default gives 1 + 4 + 9 = 14 regions.

  Returns:
    One `Windows` a partition. Together they hold Σ p² regions for any grid.

  Raises:
    ValueError: a size is not positive, or no partition is given.

  Example:
    >>> [len(windows.indices) for windows in region_partition(8, 8)]
    [1, 4, 9]
  """
  if not parts:
    raise ValueError('at least one partition is needed: parts=()')
  return tuple(partition_windows(height, width, parts=p) for p in parts)


def _scaled_logs(
  inputs: Array, power: Array | float, epsilon: float
) -> tuple[Array, Array]:
  """Float32 logs of softplus(x) + ε times p, and p for every feature."""
  power = jnp.asarray(power, jnp.float32)
  if power.ndim not in (0, 1):
    raise ValueError(f'power must be a scalar or (d,): {power.shape=}')
  power = jnp.broadcast_to(power, inputs.shape[-1:])
  logs = jnp.log(jax.nn.softplus(inputs.astype(jnp.float32)) + epsilon)
  return logs * jnp.broadcast_to(power, logs.shape), power


def _root(total: Array, power: Array) -> Array:
  return jnp.exp(total / jnp.broadcast_to(power, total.shape))


def _window_means(windows: Sequence[Windows]) -> np.ndarray:
  """(w, t): the static matrix that averages the tokens of every window."""
  rows = []
  for part in windows:
    shares = part.valid / part.valid.sum(axis=1, keepdims=True)
    matrix = np.zeros((len(shares), part.tokens), np.float32)
    np.add.at(matrix, (np.arange(len(shares))[:, None], part.indices), shares)
    rows.append(matrix)
  return np.concatenate(rows)
