r"""Losses that compare images with one learned vector, a proxy, per class.

An image whose label names no proxy has no positive: it counts zero where losses
are per image, and is a negative of every proxy in `proxy_anchor`.

Attributes:
  proxy_anchor: every proxy pulls its images and pushes the others.
  arcface: a softmax over proxies with an additive angular margin.
  normalized_softmax: a softmax over the cosines with all proxies.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msba_jax.losses.classification import label_smoothed_cross_entropy
from msba_jax.losses.reduction import masked_log_one_plus_sum_exp
from msba_jax.losses.similarity import (
  Scalar,
  check_labels,
  check_positive,
  class_targets,
  cosine_similarities,
  unit_vectors,
)

__all__ = ['arcface', 'normalized_softmax', 'proxy_anchor']


def proxy_anchor(
  embeddings: Float[Array, 'n e'],
  labels: Int[Array, ' n'],
  proxies: Float[Array, 'c e'],
  *,
  alpha: Scalar = 32.0,
  delta: Scalar = 0.1,
  valid: Bool[Array, ' n'] | None = None,
) -> Float[Array, ' c']:
  r"""Proxy-anchor loss, unreduced over proxies.

  ℓ_c = C/|P⁺| log(1 + Σ_{i: y_i = c} exp(−α (s_ic − δ)))
      + log(1 + Σ_{i: y_i ≠ c} exp(α (s_ic + δ))), where s is the cosine, C the
  number of proxies and P⁺ are those that have an image in the batch. The factor
  makes the mean over all proxies the published loss.

  Args:
    embeddings: of any length; they are normalised here.
    labels: class of every image, the index of its proxy.
    proxies: one vector per class, normalised here.
    alpha: α, sharpness.
    delta: δ, margin.
    valid: False for padding, which no proxy sees.

  Returns:
    One loss per proxy, float32 at least. The published reduction is
    `mean_over_proxies`.

  Raises:
    ValueError: the shapes disagree, or α is not positive.
    TypeError: the labels are not integers, or `valid` is not Boolean.

  Example:
    >>> embeddings, proxies = jnp.eye(2), jnp.eye(2)
    >>> losses = proxy_anchor(embeddings, jnp.arange(2), proxies)
    >>> [round(x, 4) for x in losses.tolist()]
    [3.24, 3.24]

  Source: Proxy Anchor Loss for Deep Metric Learning (2020), arXiv 2003.13911.
  """
  check_labels(embeddings, labels)
  check_positive(alpha=alpha)
  cosines = proxy_cosines(embeddings, proxies, valid)
  targets = class_targets(labels, proxies.shape[0], valid=valid)
  foreign = ~targets if valid is None else ~targets & valid[:, None]
  pull = masked_log_one_plus_sum_exp(
    -alpha * (cosines - delta), targets, axis=0
  )
  push = masked_log_one_plus_sum_exp(alpha * (cosines + delta), foreign, axis=0)
  present = jnp.sum(jnp.any(targets, axis=0), dtype=pull.dtype)
  return pull * (proxies.shape[0] / jnp.maximum(present, 1)) + push


def arcface(
  embeddings: Float[Array, 'n e'],
  labels: Int[Array, ' n'],
  proxies: Float[Array, 'c e'],
  *,
  margin: float = 0.5,
  scale: Scalar = 64.0,
  valid: Bool[Array, ' n'] | None = None,
) -> Float[Array, ' n']:
  r"""ArcFace, a softmax with an angular margin, unreduced over images.

  ℓ_i = −log softmax(s · t_i)_{y_i}, where t_ic = cos θ_ic for all classes but
  the image's own; that has cos(θ + m), or cos θ − m sin m where θ + m > π, so
  that it falls everywhere. The gradient stays finite where an image meets its
  proxy, θ = 0.

  Args:
    embeddings: of any length; they are normalised here.
    labels: class of every image, the index of its proxy.
    proxies: one vector per class, normalised here.
    margin: m, in radians.
    scale: s.
    valid: False for padding, which counts zero.

  Returns:
    One loss per image, float32 at least. The published reduction is
    `mean_over_images`.

  Raises:
    ValueError: the shapes disagree, the scale is not positive, or the margin is
      outside of 0 … π.
    TypeError: the labels are not integers, or `valid` is not Boolean.

  Example:
    >>> embeddings, proxies = jnp.eye(2), jnp.eye(2)
    >>> losses = arcface(embeddings, jnp.arange(2), proxies, scale=4.0)
    >>> [round(x, 4) for x in losses.tolist()]
    [0.0295, 0.0295]

  Source: ArcFace: Additive Angular Margin Loss for Deep Face Recognition
  (2018), arXiv 1801.07698.
  """
  check_labels(embeddings, labels)
  check_positive(scale=scale)
  if not 0 <= margin <= math.pi:
    raise ValueError(f'{margin=} must lie between 0 and π')
  cosines = proxy_cosines(embeddings, proxies, valid)
  # The root has an infinite slope at θ = 0 and θ = π: below the rounding of
  # the cosine it is held constant.
  floor = jnp.finfo(cosines.dtype).eps
  sines = jnp.sqrt(jnp.maximum(1 - jnp.square(cosines), floor))
  shifted = cosines * math.cos(margin) - sines * math.sin(margin)
  beyond = cosines < -math.cos(margin)
  own = jnp.where(beyond, cosines - margin * math.sin(margin), shifted)
  targets = class_targets(labels, proxies.shape[0], valid=valid)
  logits = scale * jnp.where(targets, own, cosines)
  return label_smoothed_cross_entropy(logits, labels, smoothing=0, valid=valid)


def normalized_softmax(
  embeddings: Float[Array, 'n e'],
  labels: Int[Array, ' n'],
  proxies: Float[Array, 'c e'],
  *,
  temperature: Scalar = 0.05,
  smoothing: Scalar = 0.0,
  valid: Bool[Array, ' n'] | None = None,
) -> Float[Array, ' n']:
  r"""Softmax over the cosines with all proxies, unreduced over images.

  ℓ_i = −Σ_c q_ic log softmax(s_i / τ)_c, where s is the cosine and q the label,
  smoothed as in `label_smoothed_cross_entropy`.

  Args:
    embeddings: of any length; they are normalised here.
    labels: class of every image, the index of its proxy.
    proxies: one vector per class, normalised here.
    temperature: τ.
    smoothing: share of the target that is spread over all classes.
    valid: False for padding, which counts zero.

  Returns:
    One loss per image, float32 at least. The published reduction is
    `mean_over_images`.

  Raises:
    ValueError: the shapes disagree, the temperature is not positive, or the
      smoothing is outside of 0 … 1.
    TypeError: the labels are not integers, or `valid` is not Boolean.

  Example:
    >>> embeddings, proxies = jnp.eye(2), jnp.eye(2)
    >>> losses = normalized_softmax(
    ...   embeddings, jnp.arange(2), proxies, temperature=1.0
    ... )
    >>> [round(x, 4) for x in losses.tolist()]
    [0.3133, 0.3133]

  Source: Classification is a Strong Baseline for Deep Metric Learning (2018),
  arXiv 1811.12649.
  """
  check_labels(embeddings, labels)
  check_positive(temperature=temperature)
  logits = proxy_cosines(embeddings, proxies, valid) / temperature
  return label_smoothed_cross_entropy(
    logits, labels, smoothing=smoothing, valid=valid
  )


def proxy_cosines(
  embeddings: Array, proxies: Array, valid: Array | None
) -> Array:
  return cosine_similarities(
    unit_vectors(embeddings, valid=valid), unit_vectors(proxies)
  )
