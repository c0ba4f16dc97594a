r"""Losses of a classifier.

Attributes:
  label_smoothed_cross_entropy: cross-entropy with softened targets.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msba_jax.losses.similarity import Scalar, check_labels, class_targets

__all__ = ['label_smoothed_cross_entropy']


def label_smoothed_cross_entropy(
  logits: Float[Array, 'n c'],
  labels: Int[Array, ' n'],
  *,
  smoothing: Scalar = 0.1,
  valid: Bool[Array, ' n'] | None = None,
) -> Float[Array, ' n']:
  r"""Cross-entropy against softened targets, unreduced over images.

  ℓ_i = −Σ_c [(1 − ε) 1(c = y_i) + ε/C] log softmax(z_i)_c. An image whose label
  is none of the C classes counts zero.

  Args:
    logits: z, finite.
    labels: class of every image.
    smoothing: ε, the share of the target that is spread over all classes.
    valid: False for padding, which counts zero.

  Returns:
    One loss per image, float32 at least. The published reduction is
    `mean_over_images`.

  Raises:
    ValueError: the shapes disagree, or ε is outside of 0 … 1.
    TypeError: the labels are not integers, or `valid` is not Boolean.

  Example:
    >>> logits = jnp.array([[2.0, 0.0], [2.0, 0.0]])
    >>> losses = label_smoothed_cross_entropy(logits, jnp.array([0, 1]))
    >>> [round(x, 4) for x in losses.tolist()]
    [0.2269, 2.0269]

  Source: Rethinking the Inception Architecture for Computer Vision (2016),
  arXiv 1512.00567.
  """
  check_labels(logits, labels)
  if isinstance(smoothing, float | int) and not 0 <= smoothing <= 1:
    raise ValueError(f'{smoothing=} must lie between 0 and 1')
  targets = class_targets(labels, logits.shape[-1], valid=valid)
  counted = jnp.any(targets, axis=-1)
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  logits = jnp.where(counted[:, None], logits, 0)
  logs = jax.nn.log_softmax(logits, axis=-1)
  hit = jnp.sum(jnp.where(targets, logs, 0), axis=-1)
  losses = -(1 - smoothing) * hit - smoothing * jnp.mean(logs, axis=-1)
  return jnp.where(counted, losses, 0)
