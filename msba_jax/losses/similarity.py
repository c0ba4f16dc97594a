r"""What a batch looks like to a loss: unit vectors, cosines, pairs, targets.

Losses compute in float32 at least, whatever the embeddings are, and with the
highest precision of the matrix product: temperatures of 0.05 and factors of 50
enlarge every rounding. An image that is not valid is replaced by zeros before
anything else happens to it, so nothing it holds, not even NaN, has influence.

Attributes:
  Scalar: type of a number that may be fixed or learned.
  cosine_similarities: cosines between two sets of vectors.
  unit_vectors: normalised vectors, zeros where an image is not valid.
  positive_pairs: pairs of valid images of one class.
  negative_pairs: pairs of valid images of two classes.
  class_targets: which proxy or logit belongs to which image.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msba_jax.layers.normalize import safe_normalize

__all__ = [
  'Scalar',
  'class_targets',
  'cosine_similarities',
  'negative_pairs',
  'positive_pairs',
  'unit_vectors',
]

Scalar = float | int | Float[Array, '']


def unit_vectors(
  vectors: Float[Array, 'n e'],
  *,
  valid: Bool[Array, ' n'] | None = None,
) -> Float[Array, 'n e']:
  r"""Unit vectors x / √(‖x‖² + ε) in float32 at least.

  Args:
    vectors: of any length; a zero vector stays zero.
    valid: False for padding, which becomes zero. None: all are valid.

  Returns:
    Vectors of length one.

  Raises:
    ValueError: `valid` is not one per vector.
    TypeError: `valid` is not Boolean.
  """
  vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
  if valid is not None:
    _check_valid(vectors.shape[:1], valid)
    vectors = jnp.where(valid[:, None], vectors, 0)
  return safe_normalize(vectors)


def cosine_similarities(
  vectors: Float[Array, 'n e'],
  others: Float[Array, 'm e'],
) -> Float[Array, 'n m']:
  r"""Cosines of all pairs of unit vectors, in the highest precision.

  Args:
    vectors: as `unit_vectors` gives them.
    others: as `unit_vectors` gives them.

  Returns:
    Inner products.

  Raises:
    ValueError: the vectors differ in length.
  """
  if vectors.shape[1:] != others.shape[1:]:
    raise ValueError(
      'embeddings and what they meet must have the same number of features: '
      f'{vectors.shape} and {others.shape}'
    )
  return jnp.einsum('ne,me->nm', vectors, others, precision='highest')


def positive_pairs(
  labels: Int[Array, ' n'],
  *,
  valid: Bool[Array, ' n'] | None = None,
) -> Bool[Array, 'n n']:
  """Pairs of two different valid images of one class.

  Args:
    labels: class of every image.
    valid: False for padding. None: all are valid.

  Returns:
    A symmetric mask, False on the diagonal.

  Raises:
    ValueError: `valid` is not one per label.
    TypeError: `valid` is not Boolean.

  Example:
    >>> positive_pairs(jnp.array([4, 4, 7])).astype(int).tolist()
    [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
  """
  same = labels[:, None] == labels[None, :]
  different_image = ~jnp.eye(labels.shape[0], dtype=bool)
  return same & different_image & _both_valid(labels, valid)


def negative_pairs(
  labels: Int[Array, ' n'],
  *,
  valid: Bool[Array, ' n'] | None = None,
) -> Bool[Array, 'n n']:
  """Pairs of two valid images of different classes.

  Args:
    labels: class of every image.
    valid: False for padding. None: all are valid.

  Returns:
    A symmetric mask, False on the diagonal.

  Raises:
    ValueError: `valid` is not one per label.
    TypeError: `valid` is not Boolean.
  """
  return (labels[:, None] != labels[None, :]) & _both_valid(labels, valid)


def class_targets(
  labels: Int[Array, ' n'],
  classes: int,
  *,
  valid: Bool[Array, ' n'] | None = None,
) -> Bool[Array, 'n c']:
  """Which of the classes belongs to which image.

  Args:
    labels: class of every image; one outside of 0 … classes − 1 has none.
    classes: their number.
    valid: False for padding. None: all are valid.

  Returns:
    A mask with at most one True per row, none in the row of a padded image.

  Raises:
    ValueError: `valid` is not one per label.
    TypeError: `valid` is not Boolean.
  """
  targets = labels[:, None] == jnp.arange(classes)[None, :]
  if valid is None:
    return targets
  _check_valid(labels.shape, valid)
  return targets & valid[:, None]


def _both_valid(labels: Array, valid: Array | None) -> Array:
  if valid is None:
    return jnp.ones((labels.shape[0],) * 2, bool)
  _check_valid(labels.shape, valid)
  return valid[:, None] & valid[None, :]


def _check_valid(shape: tuple[int, ...], valid: Array) -> None:
  if valid.shape != shape:
    raise ValueError(
      f'valid must be one per image: {valid.shape=}, images {shape}'
    )
  if valid.dtype != jnp.bool_:
    raise TypeError(f'valid must be Boolean, False is padding: {valid.dtype=}')


def check_labels(vectors: Array, labels: Array) -> None:
  """Raises unless there is one label per vector."""
  if vectors.ndim != 2 or labels.shape != vectors.shape[:1]:
    raise ValueError(
      'labels must be one per embedding, embeddings (n, e): '
      f'{labels.shape=} {vectors.shape=}'
    )
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(f'labels must be integers: {labels.dtype=}')


def check_positive(**values: Scalar) -> None:
  """Raises for a fixed number that is not positive; a learned one passes."""
  for name, value in values.items():
    if isinstance(value, float | int) and not value > 0:
      raise ValueError(f'{name} must be positive: {name}={value}')
