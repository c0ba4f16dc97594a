"""Builders of Boolean masks over (asking image, answering image).

True takes part, everywhere. Masks are combined with `&` and `|`.

Attributes:
  causal_mask: oneself and those before.
  self_mask: all others, not oneself.
  padding_mask: the images that are really there.
  same_image_mask: tokens of the same image.
  neighbour_mask: the k most similar.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = [
  'causal_mask',
  'neighbour_mask',
  'padding_mask',
  'same_image_mask',
  'self_mask',
]


def causal_mask(n: int) -> Bool[Array, 'n n']:
  """Oneself and those before: True on the diagonal and below.

  Args:
    n: number of tokens.

  Returns:
    The mask.

  Example:
    >>> causal_mask(2).tolist()
    [[True, False], [True, True]]
  """
  return jnp.tri(n, dtype=jnp.bool_)


def self_mask(n: int) -> Bool[Array, 'n n']:
  """Everyone but oneself: False on the diagonal.

  Args:
    n: number of images.

  Returns:
    The mask.

  Example:
    >>> self_mask(2).tolist()
    [[False, True], [True, False]]
  """
  return ~jnp.eye(n, dtype=jnp.bool_)


def padding_mask(valid: Bool[Array, '*b m']) -> Bool[Array, '*b 1 m']:
  """Nobody looks at a padded image.

  Args:
    valid: True where an image is really there.

  Returns:
    A mask that broadcasts over the asking images.

  Example:
    >>> padding_mask(jnp.array([True, False])).tolist()
    [[True, False]]
  """
  return valid[..., None, :]


def same_image_mask(
  asking: Int[Array, ' n'], answering: Int[Array, ' m']
) -> Bool[Array, 'n m']:
  """Tokens may look at tokens of their own image.

  Args:
    asking: image of every asking token.
    answering: image of every answering token.

  Returns:
    True where both belong to one image.

  Example:
    >>> same_image_mask(jnp.array([0, 1]), jnp.array([1, 1])).tolist()
    [[False, False], [True, True]]
  """
  return asking[:, None] == answering[None, :]


def neighbour_mask(
  similarity: Float[Array, '*b n m'], k: int
) -> Bool[Array, '*b n m']:
  """The k most similar columns of every row; ties go to the lower index.

  A similarity of minus infinity is no candidate, so that a row may keep fewer
  than k: exclude oneself or padding by setting it before.

  Args:
    similarity: larger is nearer.
    k: how many to keep, at most m.

  Returns:
    The mask, with at most k True in a row.

  Raises:
    ValueError: k is negative or larger than m.

  Example:
    >>> neighbour_mask(jnp.array([[0.1, 0.9, 0.5]]), 2).tolist()
    [[False, True, True]]
  """
  if not 0 <= k <= similarity.shape[-1]:
    raise ValueError(f'{k=} must lie in 0 … {similarity.shape[-1]}')
  _, indices = jax.lax.top_k(similarity, k)
  kept = jnp.put_along_axis(
    jnp.zeros(similarity.shape, jnp.bool_),
    indices,
    True,
    axis=-1,
    inplace=False,
  )
  return kept & (similarity > -jnp.inf)
