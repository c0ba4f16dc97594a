"""Tests of `msba_jax.losses.consistency`; the rest is in `properties_test`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.losses import consistency


def test_only_solo_moves(rng, variant):
  solo, context = (
    jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(2)
  )

  def total(solo, context):
    return consistency.solo_consistency(solo, context).sum()

  gradients = variant(jax.grad(total, (0, 1)))(solo, context)
  assert np.all(np.abs(np.asarray(gradients[0])).sum(1) > 0)
  assert not np.any(np.asarray(gradients[1]))
  # A step against the gradient brings solo nearer.
  assert total(solo - 0.1 * gradients[0], context) < total(solo, context)


def test_equal_embeddings_cost_nothing(rng):
  solo = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
  losses = consistency.solo_consistency(solo, 2 * solo)
  np.testing.assert_allclose(losses, 0, atol=1e-6)


@pytest.mark.usefixtures('unchecked')
def test_misuse_is_named():
  with pytest.raises(ValueError, match=r'must agree.*\(4, 3\).*\(5, 3\)'):
    consistency.solo_consistency(jnp.ones((4, 3)), jnp.ones((5, 3)))
