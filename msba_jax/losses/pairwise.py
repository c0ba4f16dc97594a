r"""Losses on pairs and triplets: how near the near, how far the far.

Attributes:
  multi_similarity: soft hinges on the positives and negatives of an anchor.
  batch_hard_triplet: the farthest positive against the nearest negative.
  pairwise_sigmoid: one binary decision per pair, as in SigLIP.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msba_jax.losses.reduction import masked_log_one_plus_sum_exp
from msba_jax.losses.similarity import (
  Scalar,
  check_labels,
  check_positive,
  cosine_similarities,
  negative_pairs,
  positive_pairs,
  unit_vectors,
)

__all__ = ['batch_hard_triplet', 'multi_similarity', 'pairwise_sigmoid']


def multi_similarity(
  embeddings: Float[Array, 'n e'],
  labels: Int[Array, ' n'],
  *,
  alpha: Scalar = 2.0,
  beta: Scalar = 50.0,
  base: Scalar = 0.5,
  valid: Bool[Array, ' n'] | None = None,
) -> Float[Array, ' n']:
  r"""Multi-similarity loss of every anchor, unreduced over images.

  ℓ_i = 1/α log(1 + Σ_{p ∈ P(i)} exp(−α (s_ip − λ)))
      + 1/β log(1 + Σ_{a ∈ N(i)} exp(β (s_ia − λ))), where s is the cosine, P(i)
  and N(i) are the other images of the class of i and those of other classes. No
  pairs are mined. An anchor without a positive counts zero, as in all losses of
  anchors here; pytorch-metric-learning keeps its second term.

  Args:
    embeddings: of any length; they are normalised here.
    labels: class of every image.
    alpha: α, sharpness for positives.
    beta: β, sharpness for negatives.
    base: λ, the cosine that divides near from far.
    valid: False for padding, which is neither anchor nor compared with.

  Returns:
    One loss per image, float32 at least. The published reduction is
    `mean_over_anchors`.

  Raises:
    ValueError: the shapes disagree, or α or β is not positive.
    TypeError: the labels are not integers, or `valid` is not Boolean.

  Example:
    >>> embeddings = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> losses = multi_similarity(embeddings, jnp.array([0, 0, 1]))
    >>> [round(x, 4) for x in losses.tolist()]
    [0.1566, 0.1566, 0.0]

  Source: Multi-Similarity Loss with General Pair Weighting for Deep Metric
  Learning (2019), arXiv 1904.06627.
  """
  check_labels(embeddings, labels)
  check_positive(alpha=alpha, beta=beta)
  units = unit_vectors(embeddings, valid=valid)
  excess = cosine_similarities(units, units) - base
  positive = positive_pairs(labels, valid=valid)
  negative = negative_pairs(labels, valid=valid)
  pull = masked_log_one_plus_sum_exp(-alpha * excess, positive) / alpha
  push = masked_log_one_plus_sum_exp(beta * excess, negative) / beta
  return jnp.where(jnp.any(positive, axis=-1), pull + push, 0)


def batch_hard_triplet(
  embeddings: Float[Array, 'n e'],
  labels: Int[Array, ' n'],
  *,
  margin: Scalar | None = 0.2,
  valid: Bool[Array, ' n'] | None = None,
) -> Float[Array, ' n']:
  r"""Triplet loss with the hardest positive and negative of every anchor.

  ℓ_i = max(0, max_{p ∈ P(i)} d_ip − min_{a ∈ N(i)} d_ia + margin), where d is
  the Euclidean distance of the normalised embeddings. Unreduced over images; an
  anchor without a positive or without a negative counts zero. Between equally
  hard images the first one gets the gradient.

  Args:
    embeddings: of any length; they are normalised here.
    labels: class of every image.
    margin: how much farther the negative has to be. None is the soft margin,
      log(1 + exp(d_ip − d_ia)).
    valid: False for padding, which is neither anchor nor compared with.

  Returns:
    One loss per image, float32 at least. The published reduction is
    `mean_over_anchors`.

  Raises:
    ValueError: the shapes disagree.
    TypeError: the labels are not integers, or `valid` is not Boolean.

  Example:
    >>> embeddings = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> losses = batch_hard_triplet(embeddings, jnp.array([0, 0, 1]))
    >>> [round(x, 4) for x in losses.tolist()]
    [0.2, 1.6142, 0.0]

  Source: In Defense of the Triplet Loss for Person Re-Identification (2017),
  arXiv 1703.07737.
  """
  check_labels(embeddings, labels)
  units = unit_vectors(embeddings, valid=valid)
  positive = positive_pairs(labels, valid=valid)
  negative = negative_pairs(labels, valid=valid)
  # Who is hardest is looked up without a gradient. The two distances are then
  # taken from differences, which stay exact where vectors nearly coincide.
  mined = jax.lax.stop_gradient(units)
  squares = jnp.sum(jnp.square(mined), axis=-1)
  distances = (
    squares[:, None] + squares[None, :] - 2 * cosine_similarities(mined, mined)
  )
  farthest = jnp.argmax(jnp.where(positive, distances, -jnp.inf), axis=-1)
  nearest = jnp.argmin(jnp.where(negative, distances, jnp.inf), axis=-1)
  difference = _distance(units, units[farthest]) - _distance(
    units, units[nearest]
  )
  if margin is None:
    losses = jax.nn.softplus(difference)
  else:
    losses = jax.nn.relu(difference + margin)
  complete = jnp.any(positive, axis=-1) & jnp.any(negative, axis=-1)
  return jnp.where(complete, losses, 0)


def pairwise_sigmoid(
  embeddings: Float[Array, 'n e'],
  labels: Int[Array, ' n'],
  *,
  others: Float[Array, 'm e'] | None = None,
  other_labels: Int[Array, ' m'] | None = None,
  scale: Scalar = 10.0,
  bias: Scalar = -10.0,
  valid: Bool[Array, ' n'] | None = None,
  others_valid: Bool[Array, ' m'] | None = None,
) -> Float[Array, 'n m']:
  r"""Sigmoid loss of SigLIP, unreduced over pairs.

  ℓ_im = −log σ(z_im (t s_im + b)), where s is the cosine, z_im = 1 if both
  share a label and −1 if not. For images and their texts give the texts as
  `others` and the same number as label to both of a pair. Without `others` the
  images meet each other, and none meets itself.

  Args:
    embeddings: of any length; they are normalised here.
    labels: class of every image.
    others: what the images are compared with. None: each other.
    other_labels: class of every one of the others; goes with them.
    scale: t, fixed or learned (its exponential form is the caller's).
    bias: b, fixed or learned.
    valid: False for padded images.
    others_valid: False for padded others; only with `others`.

  Returns:
    Losses of all pairs, zero where one of both is padding; float32 at least.
    The published reduction is `sum_over_pairs_per_image`.

  Raises:
    ValueError: the shapes disagree, the scale is not positive, or `others`,
      `other_labels` and `others_valid` do not go together.
    TypeError: the labels are not integers, or a mask is not Boolean.

  Example:
    >>> images, texts = jnp.eye(2), jnp.eye(2)
    >>> names = jnp.arange(2)
    >>> losses = pairwise_sigmoid(
    ...   images, names, others=texts, other_labels=names
    ... )
    >>> [round(x, 4) for x in losses.sum(axis=1).tolist()]
    [0.6932, 0.6932]

  Source: Sigmoid Loss for Language Image Pre-Training (2023), arXiv 2303.15343.
  """
  check_labels(embeddings, labels)
  check_positive(scale=scale)
  if (others is None) != (other_labels is None):
    raise ValueError('others and other_labels must be given together')
  if others is None or other_labels is None:
    if others_valid is not None:
      raise ValueError('others_valid must be given together with others')
    others, other_labels, others_valid = embeddings, labels, valid
    asked = positive_pairs(labels, valid=valid) | negative_pairs(
      labels, valid=valid
    )
  else:
    check_labels(others, other_labels)
    asked = (
      _all_if_none(valid, labels)[:, None]
      & (_all_if_none(others_valid, other_labels)[None, :])
    )
  cosines = cosine_similarities(
    unit_vectors(embeddings, valid=valid),
    unit_vectors(others, valid=others_valid),
  )
  logits = scale * cosines + bias
  matching = labels[:, None] == other_labels[None, :]
  losses = jax.nn.softplus(jnp.where(matching, -logits, logits))
  return jnp.where(asked, losses, 0)


def _all_if_none(valid: Array | None, labels: Array) -> Array:
  return jnp.ones(labels.shape, bool) if valid is None else valid


def _distance(vectors: Array, others: Array) -> Array:
  """Euclidean distances of rows; a zero one has a zero gradient."""
  squares = jnp.sum(jnp.square(vectors - others), axis=-1)
  apart = squares > 0
  return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1)), 0)
