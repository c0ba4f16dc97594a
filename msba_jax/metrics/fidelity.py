r"""How near the output of sparse attention comes to that of dense attention.

Attributes:
  Fidelity: three measures an image.
  fidelity: cosine, relative L1 distance and root mean square error.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

__all__ = ['Fidelity', 'fidelity']


class Fidelity(NamedTuple):
  """Three measures of each image, float64.

  Attributes:
    cosine: of the angle between both outputs; one for the same direction.
    relative_l1: sum of distances over the sum of sizes; zero for the same.
    rmse: root of the mean squared distance; zero for the same.
  """

  cosine: Float64[np.ndarray, ' n']
  relative_l1: Float64[np.ndarray, ' n']
  rmse: Float64[np.ndarray, ' n']


def fidelity(
  sparse: Float[np.ndarray, 'n *shape'], dense: Float[np.ndarray, 'n *shape']
) -> Fidelity:
  r"""Cosine, relative L1 and RMSE of a sparse output against the dense one.

  For every index of the first axis, with s and d the numbers over all others:

      cosine = Σ s d / √(Σ s² Σ d²),  relative L1 = Σ |s − d| / Σ |d|,
      RMSE = √(mean (s − d)²)

  Args:
    sparse: s, outputs of sparse attention, images first.
    dense: d, outputs of dense attention of the same images.

  Returns:
    `Fidelity(cosine, relative_l1, rmse)`, one number an image. Where the dense
    output is zero, a sparse one that is zero too has cosine one and distance
    zero, any other cosine zero and infinite relative distance.

  Raises:
    ValueError: the shapes differ, there is no axis beside that of the images,
      or numbers are not finite.

  Example:
    >>> found = fidelity(np.array([[3.0, 0.0]]), np.array([[3.0, 4.0]]))
    >>> [round(x.item(), 4) for x in found]
    [0.6, 0.5714, 2.8284]

  Source: SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference
  (2025), arXiv 2502.18137.
  """
  if sparse.shape != dense.shape or sparse.ndim < 2 or not sparse[:1].size:
    raise ValueError(
      'sparse and dense must agree in shape, images first: '
      f'{sparse.shape=} {dense.shape=}'
    )
  s, d = (
    np.asarray(x, np.float64).reshape(len(x), -1) for x in (sparse, dense)
  )
  for name, rows in (('sparse', s), ('dense', d)):
    if not np.isfinite(rows).all():
      raise ValueError(f'{name} holds numbers that are not finite')
  lengths = np.linalg.norm(s, axis=1) * np.linalg.norm(d, axis=1)
  away, size = np.abs(s - d).sum(axis=1), np.abs(d).sum(axis=1)
  return Fidelity(
    cosine=np.divide(
      (s * d).sum(axis=1),
      lengths,
      out=(s == d).all(axis=1).astype(np.float64),
      where=lengths > 0,
    ),
    relative_l1=np.divide(
      away, size, out=np.where(away > 0, np.inf, 0.0), where=size > 0
    ),
    rmse=np.sqrt(np.mean((s - d) ** 2, axis=1)),
  )
