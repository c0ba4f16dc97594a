r"""Named, weighted losses of a model's output, and their sum.

A term is a function of what a model returns and of the batch it was given. It
reads the keys it needs and gives one scalar, so an experiment lists its
losses as a tuple of terms and the training step knows nothing about them.

Attributes:
  LossTerm: a name, a weight and a function.
  total_loss: the weighted sum of terms, and the value of each.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ['LossTerm', 'total_loss']


class LossTerm(NamedTuple):
  """One summand of an objective.

  Attributes:
    name: what it is called in logs; unique among the terms of an objective.
    weight: its factor in the sum.
    function: `(out, batch) -> scalar`; `out` is the second value of a model,
      `batch` the dict with 'image', 'label', 'index' and 'valid'.
  """

  name: str
  weight: float
  function: Callable[[dict[str, Any], dict[str, Any]], Array]


def total_loss(
  terms: Sequence[LossTerm],
  out: dict[str, Any],
  batch: dict[str, Any],
) -> tuple[Float[Array, ''], dict[str, Array]]:
  r"""Weighted sum of terms: Σ_t weight_t · function_t(out, batch).

  Made for `jax.value_and_grad(..., has_aux=True)`.

  Args:
    terms: at least one.
    out: what a model returns beside the embeddings.
    batch: the batch it was given.

  Returns:
    The sum, and the value of every term by name, before its weight.

  Raises:
    ValueError: there is no term, two share a name, or one gives no scalar.

  Example:
    >>> terms = (LossTerm('mean', 0.5, lambda out, batch: out['solo'].mean()),)
    >>> total, values = total_loss(terms, {'solo': jnp.array([1.0, 3.0])}, {})
    >>> float(total), float(values['mean'])
    (1.0, 2.0)
  """
  names = [term.name for term in terms]
  if not names:
    raise ValueError('an objective needs at least one term')
  if len(set(names)) != len(names):
    raise ValueError(f'terms must differ in name: {names}')
  total = jnp.zeros((), jnp.float32)
  values = {}
  for term in terms:
    value = jnp.asarray(term.function(out, batch))
    if value.shape:
      raise ValueError(
        f'the loss term {term.name!r} must give a scalar: {value.shape=}'
      )
    values[term.name] = value
    total = total + term.weight * value
  return total, values
