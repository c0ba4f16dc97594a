r"""The objective of MSBA and that of a backbone alone, as tuples of terms.

Attributes:
  msba_losses: L = ½ [ℓ(solo) + ℓ(context)] + λ_c (1 − cos(solo, context)).
  solo_losses: L = ℓ(solo), for the controls.
  published_reduction: the mean that belongs to a loss of this package.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from msba_jax.losses.consistency import solo_consistency
from msba_jax.losses.contrastive import nt_xent, supervised_contrastive
from msba_jax.losses.pairwise import (
  batch_hard_triplet,
  multi_similarity,
  pairwise_sigmoid,
)
from msba_jax.losses.proxies import normalized_softmax, proxy_anchor
from msba_jax.losses.reduction import (
  Reduction,
  masked_mean,
  mean_over_anchors,
  mean_over_images,
  mean_over_positive_pairs,
  mean_over_proxies,
  sum_over_pairs_per_image,
)
from msba_jax.losses.term import LossTerm

__all__ = ['msba_losses', 'published_reduction', 'solo_losses']

_REDUCTIONS = {
  supervised_contrastive: mean_over_anchors,
  multi_similarity: mean_over_anchors,
  batch_hard_triplet: mean_over_anchors,
  nt_xent: mean_over_positive_pairs,
  pairwise_sigmoid: sum_over_pairs_per_image,
  proxy_anchor: mean_over_proxies,
}
_CLASSIFIER = functools.partial(normalized_softmax, smoothing=0.1)


def published_reduction(loss: Callable[..., Array]) -> Reduction:
  """The reduction that a loss was published with.

  Args:
    loss: a loss of this package, or a `functools.partial` of one.

  Returns:
    A reduction; `mean_over_images` for a function from elsewhere.

  Example:
    >>> gentle = functools.partial(proxy_anchor, alpha=16.0)
    >>> published_reduction(gentle).__name__
    'mean_over_proxies'
  """
  while isinstance(loss, functools.partial):
    loss = loss.func
  return _REDUCTIONS.get(loss, mean_over_images)


def msba_losses(
  loss: Callable[..., Array],
  *,
  reduce: Reduction | None = None,
  consistency: float = 0.1,
  classification_weight: float = 0.0,
  classifier: Callable[..., Array] = _CLASSIFIER,
) -> tuple[LossTerm, ...]:
  r"""Objective of MSBA: both streams learn, and solo follows context.

  L = ½ [ℓ(solo) + ℓ(context)] + λ_c mean(1 − cos(solo, stop(context)))
      + λ_y ½ [ℓ_y(solo) + ℓ_y(context)]

  The terms are called 'metric_solo', 'metric_context', 'consistency' and
  'classification'; one of weight zero is left out. They read `out['solo']`,
  `out['context']`, `batch['label']`, `batch['valid']`, and `out['proxies']` if
  a loss has a parameter of that name.

  Args:
    loss: ℓ, called as `loss(embeddings, labels, valid=valid)`, or with the
      proxies as third argument. Options are bound with `functools.partial`.
    reduce: makes a scalar of ℓ. None: `published_reduction(loss)`.
    consistency: λ_c.
    classification_weight: λ_y.
    classifier: ℓ_y, a loss over proxies unreduced over images: they are the
      classifier that both streams share. Normalised softmax, smoothing 0.1.

  Returns:
    Terms for `total_loss`.

  Raises:
    ValueError: a weight is negative; or, when the terms are evaluated, the
      model has no proxies for a loss that needs them.

  Example:
    >>> [(t.name, t.weight) for t in msba_losses(supervised_contrastive)]
    [('metric_solo', 0.5), ('metric_context', 0.5), ('consistency', 0.1)]
  """
  streams = ('solo', 'context')
  terms = [
    LossTerm(f'metric_{key}', 0.5, _stream_term(loss, (key,), reduce))
    for key in streams
  ]
  check_weight(consistency=consistency)
  if consistency > 0:
    terms.append(LossTerm('consistency', consistency, _consistency_term))
  return (
    *terms,
    *_classification_terms(classification_weight, classifier, streams),
  )


def solo_losses(
  loss: Callable[..., Array],
  *,
  reduce: Reduction | None = None,
  classification_weight: float = 0.0,
  classifier: Callable[..., Array] = _CLASSIFIER,
) -> tuple[LossTerm, ...]:
  r"""Objective of a model without context: L = ℓ(solo) + λ_y ℓ_y(solo).

  Of the same scale as `msba_losses`, so that a control trains with the same
  optimiser. The terms are called 'metric_solo' and 'classification'.

  Args:
    loss: ℓ, as in `msba_losses`.
    reduce: makes a scalar of ℓ. None: `published_reduction(loss)`.
    classification_weight: λ_y.
    classifier: ℓ_y, as in `msba_losses`.

  Returns:
    Terms for `total_loss`.

  Raises:
    ValueError: a weight is negative; or, when the terms are evaluated, the
      model has no proxies for a loss that needs them.

  Example:
    >>> [(t.name, t.weight) for t in solo_losses(proxy_anchor)]
    [('metric_solo', 1.0)]
  """
  streams = ('solo',)
  return (
    LossTerm('metric_solo', 1.0, _stream_term(loss, streams, reduce)),
    *_classification_terms(classification_weight, classifier, streams),
  )


def _classification_terms(
  weight: float, classifier: Callable[..., Array], streams: tuple[str, ...]
) -> tuple[LossTerm, ...]:
  check_weight(classification_weight=weight)
  if weight == 0:
    return ()
  function = _stream_term(classifier, streams, mean_over_images)
  return (LossTerm('classification', weight, function),)


def _stream_term(
  loss: Callable[..., Array],
  streams: tuple[str, ...],
  reduce: Reduction | None,
) -> Callable[[dict[str, Any], dict[str, Any]], Array]:
  """Mean over streams of a reduced loss."""
  reduction = published_reduction(loss) if reduce is None else reduce
  needs_proxies = 'proxies' in inspect.signature(loss).parameters

  def evaluate(out: dict[str, Any], batch: dict[str, Any]) -> Array:
    labels, valid = batch['label'], batch['valid']
    proxies = ()
    if needs_proxies:
      if out.get('proxies') is None:
        raise ValueError(
          f"{_name(loss)} needs proxies, but out['proxies'] is None: "
          'build the model with one proxy per class'
        )
      proxies = (out['proxies'],)
    values = [
      reduction(loss(out[key], labels, *proxies, valid=valid), labels, valid)
      for key in streams
    ]
    return sum(values[1:], values[0]) / len(values)

  return evaluate


def _consistency_term(out: dict[str, Any], batch: dict[str, Any]) -> Array:
  valid = batch['valid']
  return masked_mean(
    solo_consistency(out['solo'], out['context'], valid=valid), valid
  )


def _name(loss: Callable[..., Array]) -> str:
  while isinstance(loss, functools.partial):
    loss = loss.func
  return getattr(loss, '__name__', repr(loss))


def check_weight(**weights: float) -> None:
  for name, weight in weights.items():
    if not weight >= 0:
      raise ValueError(f'{name} must not be negative: {name}={weight}')
