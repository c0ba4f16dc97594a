r"""Sums over masked arrays, and the means that turn a loss into a number.

Losses come unreduced. A reduction takes the unreduced losses, the labels and
the validity of the images and gives a scalar; one that finds nothing to average
gives exactly zero, with a zero gradient.

Attributes:
  Reduction: type of a reduction, `(losses, labels, valid) -> scalar`.
  masked_mean: the mean of the entries that a mask keeps.
  masked_log_sum_exp: log Σ exp over the entries that a mask keeps.
  masked_log_one_plus_sum_exp: log(1 + Σ exp) over those entries.
  mean_over_images: the mean of one loss per image, over the valid images.
  mean_over_anchors: the same, over valid images that have a positive.
  mean_over_positive_pairs: the mean of a matrix over its positive pairs.
  mean_over_proxies: the mean of one loss per proxy.
  sum_over_pairs_per_image: the sum of a matrix over the number of valid images.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msba_jax.losses.similarity import positive_pairs

__all__ = [
  'Reduction',
  'masked_log_one_plus_sum_exp',
  'masked_log_sum_exp',
  'masked_mean',
  'mean_over_anchors',
  'mean_over_images',
  'mean_over_positive_pairs',
  'mean_over_proxies',
  'sum_over_pairs_per_image',
]

Reduction = Callable[[Array, Array, Array], Array]


def masked_mean(
  values: Float[Array, '*shape'],
  mask: Bool[Array, '*shape'] | None = None,
) -> Float[Array, '']:
  r"""Mean of what the mask keeps: Σ mask · values / max(1, Σ mask).

  What is left out has no influence, even where it is NaN.

  Args:
    values: any array.
    mask: of the same shape, True takes part. None: everything does.

  Returns:
    A scalar, at least float32; zero where the mask keeps nothing.

  Raises:
    ValueError: the mask has another shape than the values.
    TypeError: the mask is not Boolean.

  Example:
    >>> values = jnp.array([1.0, 3.0, jnp.nan])
    >>> float(masked_mean(values, jnp.array([True, True, False])))
    2.0
  """
  if mask is None:
    mask = jnp.ones(values.shape, bool)
  if mask.shape != values.shape:
    raise ValueError(
      f'mask and values must agree: {mask.shape=} {values.shape=}'
    )
  if mask.dtype != jnp.bool_:
    raise TypeError(f'mask must be Boolean, True takes part: {mask.dtype=}')
  values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
  total = jnp.sum(jnp.where(mask, values, 0))
  return total / jnp.maximum(jnp.sum(mask, dtype=values.dtype), 1)


def masked_log_sum_exp(
  scores: Float[Array, 'n m'],
  mask: Bool[Array, 'n m'],
  *,
  axis: int = -1,
) -> tuple[Array, Array]:
  r"""Log-normaliser of what the mask keeps: log Σ mask · exp(scores).

  Args:
    scores: exponents.
    mask: True takes part.
    axis: axis of the sum.

  Returns:
    The logarithms, zero where the mask keeps nothing; and a Boolean array that
    says where it keeps something.
  """
  alive = jnp.any(mask, axis=axis, keepdims=True)
  filled = jnp.where(mask, scores, jnp.where(alive, -jnp.inf, 0))
  alive = jnp.squeeze(alive, axis=axis)
  total = jax.nn.logsumexp(filled, axis=axis)
  return jnp.where(alive, total, 0), alive


def masked_log_one_plus_sum_exp(
  scores: Float[Array, 'n m'],
  mask: Bool[Array, 'n m'],
  *,
  axis: int = -1,
) -> Array:
  r"""Soft maximum of zero and the scores: log(1 + Σ mask · exp(scores)).

  Args:
    scores: exponents.
    mask: True takes part.
    axis: axis of the sum.

  Returns:
    One number per remaining index; exactly zero where the mask keeps nothing.
  """
  total, alive = masked_log_sum_exp(scores, mask, axis=axis)
  return jnp.where(alive, jax.nn.softplus(total), 0)


def mean_over_images(
  losses: Float[Array, ' n'],
  labels: Int[Array, ' n'],
  valid: Bool[Array, ' n'],
) -> Float[Array, '']:
  """Mean of one loss per image over the valid images.

  Args:
    losses: unreduced over images.
    labels: class of every image; only its shape is looked at.
    valid: False for padding.

  Returns:
    A scalar; zero without a valid image.

  Raises:
    ValueError: the losses are not one per image.
  """
  _check_one_per_image(losses, labels)
  return masked_mean(losses, valid)


def mean_over_anchors(
  losses: Float[Array, ' n'],
  labels: Int[Array, ' n'],
  valid: Bool[Array, ' n'],
) -> Float[Array, '']:
  """Mean of one loss per image over the valid images that have a positive.

  Args:
    losses: unreduced over images.
    labels: class of every image.
    valid: False for padding.

  Returns:
    A scalar; zero where no image has a positive.

  Raises:
    ValueError: the losses are not one per image.
  """
  _check_one_per_image(losses, labels)
  return masked_mean(
    losses, jnp.any(positive_pairs(labels, valid=valid), axis=-1)
  )


def mean_over_positive_pairs(
  losses: Float[Array, 'n n'],
  labels: Int[Array, ' n'],
  valid: Bool[Array, ' n'],
) -> Float[Array, '']:
  """Mean of one loss per pair over the pairs of valid images of one class.

  Args:
    losses: unreduced over pairs.
    labels: class of every image.
    valid: False for padding.

  Returns:
    A scalar; zero where no image has a positive.

  Raises:
    ValueError: the losses are not one per pair of images.
  """
  return masked_mean(losses, positive_pairs(labels, valid=valid))


def mean_over_proxies(
  losses: Float[Array, ' c'],
  labels: Int[Array, ' n'],
  valid: Bool[Array, ' n'],
) -> Float[Array, '']:
  """Mean of one loss per proxy, over all proxies.

  Args:
    losses: unreduced over proxies.
    labels: class of every image; unused, all reductions look alike.
    valid: False for padding; unused.

  Returns:
    A scalar.
  """
  del labels, valid
  return masked_mean(losses)


def sum_over_pairs_per_image(
  losses: Float[Array, 'n m'],
  labels: Int[Array, ' n'],
  valid: Bool[Array, ' n'],
) -> Float[Array, '']:
  """Sum of one loss per pair, divided by the number of valid asking images.

  Args:
    losses: unreduced over pairs.
    labels: class of every asking image; only its shape is looked at.
    valid: False for padding.

  Returns:
    A scalar; zero without a valid image.

  Raises:
    ValueError: the losses do not have one row per image.
  """
  if losses.ndim != 2 or losses.shape[:1] != labels.shape:
    raise ValueError(
      f'losses must have one row per image: {losses.shape=} {labels.shape=}'
    )
  return masked_mean(jnp.sum(losses, axis=-1), valid)


def _check_one_per_image(losses: Array, labels: Array) -> None:
  if losses.shape != labels.shape:
    raise ValueError(
      f'losses must be one per image: {losses.shape=} {labels.shape=}; '
      'choose another reduction'
    )
