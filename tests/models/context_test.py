"""Tests of `msba_jax.models.context`: the moving-average memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from msba_jax.models import context


def test_a_slot_takes_the_mean_first_and_moves_towards_it_later(variant, rng):
  bank = context.create_memory(4, levels=2, regions=3, features=5)
  assert not np.any(np.asarray(bank.valid))
  push = variant(functools.partial(context.push_memory, decay=0.75))
  slots = jnp.array([1, 1, 3, 0])
  valid = jnp.array([True, True, True, False])
  first = jnp.asarray(rng.normal(size=(2, 4, 3, 5)), jnp.float32)
  second = jnp.asarray(rng.normal(size=(2, 4, 3, 5)), jnp.float32)
  bank = push(bank, first, slots, valid=valid)
  np.testing.assert_array_equal(bank.valid, [False, True, False, True])
  mean = np.asarray(first[:, :2]).mean(1)
  np.testing.assert_allclose(bank.regions[:, 1], mean, rtol=1e-6)
  np.testing.assert_allclose(bank.regions[:, 3], first[:, 2], rtol=1e-6)
  assert np.all(np.asarray(bank.regions[:, 0]) == 0)
  bank = push(bank, second, slots, valid=valid)
  expected = 0.75 * mean + 0.25 * np.asarray(second[:, :2]).mean(1)
  np.testing.assert_allclose(bank.regions[:, 1], expected, rtol=1e-5)


def test_slots_outside_the_bank_are_not_written(rng):
  bank = context.create_memory(2, levels=1, regions=1, features=1)
  regions = jnp.asarray(rng.normal(size=(1, 3, 1, 1)), jnp.float32)
  bank = context.push_memory(
    bank, regions, jnp.array([-1, 2, 1]), valid=jnp.ones(3, bool)
  )
  np.testing.assert_array_equal(bank.valid, [False, True])


def test_no_gradient_enters_the_bank(rng):
  bank = context.create_memory(2, levels=1, regions=1, features=1)

  def total(regions):
    pushed = context.push_memory(
      bank, regions, jnp.array([0, 1]), valid=jnp.ones(2, bool)
    )
    return jnp.sum(pushed.regions)

  regions = jnp.asarray(rng.normal(size=(1, 2, 1, 1)), jnp.float32)
  assert np.all(np.asarray(jax.grad(total)(regions)) == 0)


def test_a_bank_is_a_context():
  bank = context.create_memory(2, levels=1, regions=1, features=1)
  joint = context.batch(jnp.ones(3, bool), memory=bank)
  chex.assert_trees_all_equal(joint.memory, bank.context())
