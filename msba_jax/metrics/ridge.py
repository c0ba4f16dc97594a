r"""A linear map from one space of features to another, by least squares.

Attributes:
  RidgeMap: the map.
  ridge_map: finds it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

__all__ = ['RidgeMap', 'ridge_map']


class RidgeMap(NamedTuple):
  """A linear map: y = (x − centre) · kernel + offset.

  Attributes:
    centre: mean of the inputs.
    kernel: one column an output.
    offset: mean of the outputs.
    ridge: the penalty that was chosen.
  """

  centre: Float64[np.ndarray, ' d']
  kernel: Float64[np.ndarray, 'd e']
  offset: Float64[np.ndarray, ' e']
  ridge: float

  def __call__(
    self, inputs: Float[np.ndarray, '*b d']
  ) -> Float64[np.ndarray, '*b e']:
    """The map applied to the last axis."""
    return (inputs - self.centre) @ self.kernel + self.offset


def ridge_map(
  inputs: Float[np.ndarray, 'p d'],
  targets: Float[np.ndarray, 'p e'],
  *,
  ridges: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
) -> RidgeMap:
  r"""The map that least squares finds from one space to another.

      min_K ‖Y − X K‖² + λ σ² ‖K‖²,  X and Y centred, σ² the largest
      eigenvalue of XᵀX

  λ is the one with the smallest squared error when each row in turn is left
  out, which the eigenvectors of XᵀX tell for all rows at once.

  Args:
    inputs: x.
    targets: y.
    ridges: candidates for λ, above 0.

  Returns:
    The map, float64.

  Raises:
    ValueError: there are fewer than two rows, numbers are not finite, or a
      candidate is not above 0.

  Example:
    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> to = ridge_map(x, 3 * x + 1, ridges=[1e-9])
    >>> to(np.array([[3.0]])).round(4).tolist()
    [[10.0]]

  Source: Generalized Cross-Validation (Golub, Heath, Wahba, 1979).
  """
  if len(inputs) < 2 or len(inputs) != len(targets):
    raise ValueError(
      f'two rows and more, as many of both: {inputs.shape=} {targets.shape=}'
    )
  if not ridges or min(ridges) <= 0:
    raise ValueError(f'{ridges=} must be above 0')
  x, y = (np.asarray(a, np.float64) for a in (inputs, targets))
  if not (np.isfinite(x).all() and np.isfinite(y).all()):
    raise ValueError('inputs or targets hold numbers that are not finite')
  centre, offset = x.mean(axis=0), y.mean(axis=0)
  x, y = x - centre, y - offset
  values, vectors = np.linalg.eigh(x.T @ x)
  values = np.maximum(values, 0)
  rotated, projected = x @ vectors, vectors.T @ (x.T @ y)
  largest = values[-1] or 1.0
  errors: list[float] = []
  for ridge in ridges:
    inverse = 1 / (values + ridge * largest)
    left = y - rotated @ (inverse[:, None] * projected)
    # 1/p is the share that the mean has of a row.
    own = (rotated**2) @ inverse + 1 / len(x)
    errors.append(
      float(np.sum((left / np.maximum(1 - own, 1e-9)[:, None]) ** 2))
    )
  ridge = ridges[int(np.argmin(errors))]
  kernel = vectors @ (projected / (values + ridge * largest)[:, None])
  return RidgeMap(centre, kernel, offset, ridge)
