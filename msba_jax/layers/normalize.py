"""Normalisation with the epsilon inside the root, so that zero has a gradient.

Attributes:
  safe_normalize: to unit norm; a zero vector stays zero.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ['safe_normalize']


def safe_normalize(
  inputs: Float[Array, '...'], *, axis: int = -1, epsilon: float = 1e-12
) -> Float[Array, '...']:
  r"""Unit norm along an axis: x / √(Σ x² + ε).

  The sum runs in float32 or wider. A zero vector gives zero and a gradient of
  at most 1 / √ε, where dividing by `jnp.linalg.norm` gives NaN. Large vectors
  are scaled down first, so that their squares do not overflow.

  Args:
    inputs: vectors.
    axis: the axis that holds a vector.
    epsilon: added inside the root.

  Returns:
    Vectors of unit norm in the dtype of the inputs.

  Example:
    >>> unit = safe_normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    >>> [[round(x, 4) for x in row] for row in unit.tolist()]
    [[0.6, 0.8], [0.0, 0.0]]
  """
  vectors = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
  peak = jax.lax.stop_gradient(
    jnp.max(jnp.abs(vectors), axis=axis, keepdims=True)
  )
  vectors = vectors / jnp.maximum(peak, 1)
  squares = jnp.sum(jnp.square(vectors), axis=axis, keepdims=True)
  return (vectors * jax.lax.rsqrt(squares + epsilon)).astype(inputs.dtype)
