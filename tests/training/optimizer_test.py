import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msba_jax.training.experiment import OptimizerConfig
from msba_jax.training.optimizer import (
  decay_mask,
  learning_rate,
  make_optimizer,
)


def test_the_rate_rises_and_falls():
  config = OptimizerConfig(learning_rate=2.0, warmup_steps=4)
  rate = learning_rate(config, steps=12)
  expected = [
    2.0 * min((t + 1) / 4, 1.0) * 0.5 * (1 + np.cos(np.pi * max(t - 4, 0) / 8))
    for t in range(12)
  ]
  np.testing.assert_allclose([rate(t) for t in range(12)], expected, rtol=1e-5)
  assert rate(0) > 0
  assert rate(11) > 0


def test_a_constant_rate_stays():
  config = OptimizerConfig(
    learning_rate=2.0, warmup_steps=2, schedule='constant'
  )
  rate = learning_rate(config, steps=5)
  np.testing.assert_allclose([rate(t) for t in range(5)], [1, 2, 2, 2, 2])


def test_no_warmup():
  config = OptimizerConfig(learning_rate=2.0, warmup_steps=0)
  assert learning_rate(config, steps=5)(0) == 2.0


def test_a_warmup_that_does_not_end_is_refused():
  config = OptimizerConfig(warmup_steps=100)
  with pytest.raises(ValueError, match=r'warmup_steps=100 .* less than steps'):
    make_optimizer(config, steps=100)


def test_only_kernels_and_tables_decay():
  params = {
    'dense': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)},
    'heads': {'kernel': jnp.ones((2, 2, 3)), 'bias': jnp.ones((2, 3))},
    'norm': {'scale': jnp.ones(3), 'bias': jnp.ones(3)},
    'power': jnp.ones(()),
    'table': {'embedding': jnp.ones((5, 3))},
  }
  assert decay_mask(params) == {
    'dense': {'kernel': True, 'bias': False},
    'heads': {'kernel': True, 'bias': False},
    'norm': {'scale': False, 'bias': False},
    'power': False,
    'table': {'embedding': True},
  }


def test_without_a_gradient_only_decay_moves():
  config = OptimizerConfig(
    learning_rate=0.1, warmup_steps=0, schedule='constant', weight_decay=0.5
  )
  params = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}
  optimizer = make_optimizer(config, steps=10)
  updates, _ = optimizer.update(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
  )
  moved = optax.apply_updates(params, updates)
  np.testing.assert_allclose(moved['kernel'], 1 - 0.1 * 0.5, rtol=1e-6)
  np.testing.assert_array_equal(moved['bias'], 1.0)


def test_a_huge_gradient_is_clipped():
  config = OptimizerConfig(clip_norm=1.0, warmup_steps=0)
  params = {'kernel': jnp.zeros((2, 2))}
  optimizer = make_optimizer(config, steps=10)
  small = optimizer.init(params)
  gradient = {'kernel': jnp.full((2, 2), 0.5)}  # of norm 1
  huge = {'kernel': jnp.full((2, 2), 5e8)}
  _, after_small = optimizer.update(gradient, small, params)
  _, after_huge = optimizer.update(huge, small, params)
  for a, b in zip(
    jax.tree.leaves(after_small), jax.tree.leaves(after_huge), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5)
