r"""The term that lets an image alone inherit what its context teaches.

Attributes:
  solo_consistency: distance of the solo from the context embedding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msba_jax.losses.similarity import unit_vectors

__all__ = ['solo_consistency']


def solo_consistency(
  solo: Float[Array, 'n e'],
  context: Float[Array, 'n e'],
  *,
  valid: Bool[Array, ' n'] | None = None,
) -> Float[Array, ' n']:
  r"""Cosine distance of solo from context, unreduced over images.

  ℓ_i = 1 − cos(solo_i, stop_gradient(context_i)): the solo embedding moves, the
  context embedding does not.

  Args:
    solo: embeddings of the images alone, of any length.
    context: embeddings of the same images in their context.
    valid: False for padding, which counts zero.

  Returns:
    One loss per image, float32 at least; one for a zero vector. The reduction
    of MSBA is `mean_over_images`.

  Raises:
    ValueError: the shapes disagree.
    TypeError: `valid` is not Boolean.

  Example:
    >>> solo = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> context = jnp.array([[2.0, 0.0], [0.0, 3.0]])
    >>> solo_consistency(solo, context).tolist()
    [0.0, 1.0]
  """
  if solo.shape != context.shape:
    raise ValueError(
      f'solo and context must agree: {solo.shape=} {context.shape=}'
    )
  own = unit_vectors(solo, valid=valid)
  taught = unit_vectors(jax.lax.stop_gradient(context), valid=valid)
  losses = 1 - jnp.sum(own * taught, axis=-1)
  return losses if valid is None else jnp.where(valid, losses, 0)
