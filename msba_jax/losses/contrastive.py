r"""Contrastive losses: a softmax of an anchor over the images of its batch.

Attributes:
  supervised_contrastive: all positives of an anchor against all other images.
  nt_xent: every positive pair against the negatives of its anchor.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msba_jax.losses.reduction import masked_log_sum_exp
from msba_jax.losses.similarity import (
  Scalar,
  check_labels,
  check_positive,
  cosine_similarities,
  negative_pairs,
  positive_pairs,
  unit_vectors,
)

__all__ = ['nt_xent', 'supervised_contrastive']


def supervised_contrastive(
  embeddings: Float[Array, 'n e'],
  labels: Int[Array, ' n'],
  *,
  temperature: Scalar = 0.1,
  valid: Bool[Array, ' n'] | None = None,
) -> Float[Array, ' n']:
  r"""Supervised contrastive loss of every anchor, unreduced over images.

  ℓ_i = −1/|P(i)| Σ_{p ∈ P(i)} [s_ip/τ − log Σ_{a ≠ i} exp(s_ia/τ)], where s is
  the cosine and P(i) are the other images of the class of i. An anchor without
  a positive counts zero. Unlike pytorch-metric-learning, which gives zero to a
  batch of a single class, the equation is followed there as well: the loss then
  pulls the positives of an anchor to equal similarity.

  Args:
    embeddings: of any length; they are normalised here.
    labels: class of every image.
    temperature: τ.
    valid: False for padding, which is neither anchor nor compared with.

  Returns:
    One loss per image, float32 at least. The published reduction is
    `mean_over_anchors`.

  Raises:
    ValueError: the shapes disagree, or the temperature is not positive.
    TypeError: the labels are not integers, or `valid` is not Boolean.

  Example:
    >>> embeddings = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> losses = supervised_contrastive(
    ...   embeddings, jnp.array([0, 0, 1]), temperature=1.0
    ... )
    >>> [round(x, 4) for x in losses.tolist()]
    [0.3133, 0.3133, 0.0]

  Source: Supervised Contrastive Learning (2020), arXiv 2004.11362, equation 2.
  """
  check_labels(embeddings, labels)
  check_positive(temperature=temperature)
  units = unit_vectors(embeddings, valid=valid)
  scores = cosine_similarities(units, units) / temperature
  positive = positive_pairs(labels, valid=valid)
  compared = positive | negative_pairs(labels, valid=valid)
  normalizer, _ = masked_log_sum_exp(scores, compared)
  surprise = jnp.where(positive, normalizer[:, None] - scores, 0)
  count = jnp.sum(positive, axis=-1, dtype=scores.dtype)
  return jnp.sum(surprise, axis=-1) / jnp.maximum(count, 1)


def nt_xent(
  embeddings: Float[Array, 'n e'],
  labels: Int[Array, ' n'],
  *,
  temperature: Scalar = 0.1,
  valid: Bool[Array, ' n'] | None = None,
) -> Float[Array, 'n n']:
  r"""Normalised temperature-scaled cross-entropy, unreduced over pairs.

  ℓ_ip = −log(exp(s_ip/τ) / (exp(s_ip/τ) + Σ_{a ∈ N(i)} exp(s_ia/τ))) for every
  pair of two images of one class, where s is the cosine and N(i) are the images
  of other classes. Two views of an image that share a label of their own make
  it the loss of SimCLR.

  Args:
    embeddings: of any length; they are normalised here.
    labels: class of every image; the same for two views of one image.
    temperature: τ.
    valid: False for padding, which is neither anchor nor compared with.

  Returns:
    Losses of (anchor, positive), zero at all other pairs; float32 at least. The
    published reduction is `mean_over_positive_pairs`.

  Raises:
    ValueError: the shapes disagree, or the temperature is not positive.
    TypeError: the labels are not integers, or `valid` is not Boolean.

  Example:
    >>> embeddings = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> losses = nt_xent(embeddings, jnp.array([0, 0, 1]), temperature=1.0)
    >>> [round(x, 4) for x in losses.sum(axis=1).tolist()]
    [0.6931, 1.3133, 0.0]

  Source: A Simple Framework for Contrastive Learning of Visual Representations
  (2020), arXiv 2002.05709.
  """
  check_labels(embeddings, labels)
  check_positive(temperature=temperature)
  units = unit_vectors(embeddings, valid=valid)
  scores = cosine_similarities(units, units) / temperature
  positive = positive_pairs(labels, valid=valid)
  others, opposed = masked_log_sum_exp(
    scores, negative_pairs(labels, valid=valid)
  )
  losses = jax.nn.softplus(others[:, None] - scores)
  return jnp.where(positive & opposed[:, None], losses, 0)
