r"""The objective of CASTLE, as terms.

Attributes:
  counterfactual_effect: cross-entropy of what attention adds to the logits.
  castle_losses: the objective of MSBA, the effect, and penalties of the graph.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msba_jax.losses.classification import label_smoothed_cross_entropy
from msba_jax.losses.objective import check_weight, msba_losses
from msba_jax.losses.proxies import proxy_cosines
from msba_jax.losses.reduction import mean_over_images
from msba_jax.losses.similarity import Scalar, check_labels, check_positive
from msba_jax.losses.term import LossTerm

__all__ = ['castle_losses', 'counterfactual_effect']


def counterfactual_effect(
  factual: Float[Array, 'n e'],
  counterfactual: Float[Array, 'n e'],
  labels: Int[Array, ' n'],
  proxies: Float[Array, 'c e'],
  *,
  temperature: Scalar = 0.05,
  valid: Bool[Array, ' n'] | None = None,
) -> Float[Array, ' n']:
  r"""Cross-entropy of y(A) − y(Ā), unreduced over images.

  y are the cosines with all proxies over the temperature, A the weights of the
  attention and Ā weights that say nothing: what attention adds has to speak for
  the label. Where both are equal the loss is log c, without a gradient to what
  they have in common.

  Args:
    factual: embeddings with the weights of the attention.
    counterfactual: embeddings with weights that say nothing.
    labels: class of every image, the index of its proxy.
    proxies: one vector per class, normalised here.
    temperature: of the cosines.
    valid: False for padding, which counts zero.

  Returns:
    One loss per image, float32 at least. The published reduction is
    `mean_over_images`.

  Raises:
    ValueError: the shapes disagree, or the temperature is not positive.
    TypeError: the labels are not integers, or `valid` is not Boolean.

  Example:
    >>> said, nothing = jnp.eye(2), jnp.eye(2)[::-1]
    >>> losses = counterfactual_effect(
    ...   said, nothing, jnp.arange(2), jnp.eye(2), temperature=1.0
    ... )
    >>> [round(x, 4) for x in losses.tolist()]
    [0.1269, 0.1269]

  Source: Counterfactual Attention Learning (2021), arXiv 2108.08728.
  """
  check_labels(factual, labels)
  check_labels(counterfactual, labels)
  check_positive(temperature=temperature)
  added = proxy_cosines(factual, proxies, valid) - proxy_cosines(
    counterfactual, proxies, valid
  )
  return label_smoothed_cross_entropy(
    added / temperature, labels, smoothing=0.0, valid=valid
  )


def castle_losses(
  loss: Callable[..., Array],
  *,
  effect: float = 1.0,
  acyclicity: float = 0.01,
  sparsity: float = 1e-4,
  **of_msba: Any,
) -> tuple[LossTerm, ...]:
  r"""Objective of CASTLE: that of MSBA, the effect, and a graph to believe.

  L = L_MSBA + λ_e L_effect + λ_a Σ_l −logdet(I − W^l)/n + λ_s Σ_l Σ|W^l|/n

  The terms beside those of MSBA are called 'effect', 'acyclicity' and
  'sparsity'; one of weight zero is left out. They read `out['context']`,
  `out['counterfactual']`, `out['proxies']`, `out['aux']['graph']`,
  `batch['label']` and `batch['valid']`.

  Args:
    loss: as in `msba_losses`.
    effect: λ_e.
    acyclicity: λ_a.
    sparsity: λ_s.
    **of_msba: further arguments of `msba_losses`.

  Returns:
    Terms for `total_loss`.

  Raises:
    ValueError: a weight is negative; or, when the terms are evaluated, the
      model does not give what a term reads.

  Example:
    >>> from msba_jax.losses import proxy_anchor
    >>> [(t.name, t.weight) for t in castle_losses(proxy_anchor)][3:]
    [('effect', 1.0), ('acyclicity', 0.01), ('sparsity', 0.0001)]
  """
  check_weight(effect=effect, acyclicity=acyclicity, sparsity=sparsity)
  terms = (
    LossTerm('effect', effect, _effect_term),
    LossTerm('acyclicity', acyclicity, _graph_term('acyclicity')),
    LossTerm('sparsity', sparsity, _graph_term('edges')),
  )
  return (
    *msba_losses(loss, **of_msba),
    *(term for term in terms if term.weight > 0),
  )


def _effect_term(out: dict[str, Any], batch: dict[str, Any]) -> Array:
  for name in ('counterfactual', 'proxies'):
    if out.get(name) is None:
      raise ValueError(
        f'the effect loss needs out[{name!r}]: build the model with '
        'effect=True and one proxy per class, and apply it with a key `dropout`'
      )
  labels, valid = batch['label'], batch['valid']
  losses = counterfactual_effect(
    out['context'], out['counterfactual'], labels, out['proxies'], valid=valid
  )
  return mean_over_images(losses, labels, valid)


def _graph_term(
  name: str,
) -> Callable[[dict[str, Any], dict[str, Any]], Array]:
  """What the graph told of itself."""

  def evaluate(out: dict[str, Any], batch: dict[str, Any]) -> Array:
    del batch
    graph = out['aux']['graph']
    if name not in graph:
      raise ValueError(
        f'the model tells no {name} of its graph: build it with a causal '
        'graph, or give this term the weight 0'
      )
    return jnp.asarray(graph[name])

  return evaluate
