"""Tests of `msba_jax.losses.term`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.losses.term import LossTerm, total_loss


def first(out, batch):
  return jnp.sum(out['solo'] * batch['weight'])


def second(out, batch):
  del batch
  return jnp.max(out['solo']).astype(jnp.bfloat16)


TERMS = (LossTerm('first', 2.0, first), LossTerm('second', 0.5, second))


def test_terms_are_weighted_and_reported(variant):
  def objective(solo):
    return total_loss(TERMS, {'solo': solo}, {'weight': 3.0})

  (total, values), gradient = variant(
    jax.value_and_grad(objective, has_aux=True)
  )(jnp.array([1.0, 4.0]))
  assert total == 2 * 15 + 0.5 * 4
  assert total.dtype == jnp.float32
  assert {name: float(x) for name, x in values.items()} == {
    'first': 15, 'second': 4
  }  # fmt: skip
  np.testing.assert_array_equal(gradient, [6, 6.5])


def test_misuse_is_named():
  with pytest.raises(ValueError, match='at least one term'):
    total_loss((), {}, {})
  with pytest.raises(ValueError, match=r'differ in name.*first'):
    total_loss((TERMS[0], TERMS[0]), {}, {})
  vector = LossTerm('wide', 1.0, lambda out, batch: out['solo'])
  with pytest.raises(ValueError, match=r"'wide' must give a scalar.*\(2,\)"):
    total_loss((vector,), {'solo': jnp.ones(2)}, {})
