"""Tests of `msba_jax.metrics.cost`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.metrics.cost import attention_share, block_flops, compiled_cost


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
  ('tokens', 'features', 'percent'),
  [(14 * 14, 384, 7.8), (56 * 56, 64, 89), (32 * 196, 384, 73)],
)
def test_the_ceiling(tokens, features, percent):
  found = 100 * attention_share(tokens, features)
  np.testing.assert_allclose(found, percent, atol=0.5 if percent > 10 else 0.05)
  np.testing.assert_allclose(found, 100 * tokens / (tokens + 6 * features))


@pytest.mark.parametrize('ratio', [0.0, 2.0, 4.0])
def test_the_share_is_what_keeping_nothing_saves(ratio):
  for tokens, features in ((1, 8), (49, 96), (3136, 64)):
    dense, none = (
      block_flops(tokens, features, kept=kept, ratio=ratio) for kept in (1, 0)
    )
    np.testing.assert_allclose(
      1 - none / dense, attention_share(tokens, features, ratio=ratio)
    )
    half = block_flops(tokens, features, kept=0.5, ratio=ratio)
    np.testing.assert_allclose(half, (dense + none) / 2)


@pytest.mark.parametrize('ratio', [1, 4])
def test_flops_are_those_of_the_matrix_products(ratio):
  """What XLA counts of them; nothing else is in this block."""
  n, c = 24, 16

  def block(x, project, out, grow, shrink):
    queries, keys, values = jnp.split(x @ project, 3, axis=-1)
    x = (queries @ keys.T) @ values @ out
    return x @ grow @ shrink

  found = compiled_cost(
    block,
    shape(n, c),
    shape(c, 3 * c),
    shape(c, c),
    shape(c, ratio * c),
    shape(ratio * c, c),
  )
  np.testing.assert_allclose(
    found.flops, block_flops(n, c, ratio=ratio), rtol=1e-3
  )
  assert found.loops == 0


def test_temporary_arrays_are_counted():
  """The n × n scores lie between the arguments and the result."""
  cost = compiled_cost(
    lambda q, k: jax.nn.softmax(q @ k.T) @ k, shape(64, 8), shape(64, 8)
  )
  assert 64 * 64 * 4 <= cost.temporary_bytes <= 4 * 64 * 64 * 4
  longer = compiled_cost(
    lambda q, k: jax.nn.softmax(q @ k.T) @ k, shape(256, 8), shape(256, 8)
  )
  assert 8 < longer.temporary_bytes / cost.temporary_bytes < 32


def test_the_body_of_a_loop_counts_once():
  def product(x):
    return x @ x

  def repeated(x):
    return jax.lax.fori_loop(0, 10, lambda _, x: product(x), x)

  once, often = (compiled_cost(f, shape(16, 16)) for f in (product, repeated))
  assert (once.loops, often.loops) == (0, 1)
  np.testing.assert_allclose(often.flops, once.flops, rtol=1e-2)


def test_arrays_trees_and_compiled_functions_are_taken(rng):
  def function(tree):
    return tree['a'] @ tree['b']

  tree = {
    key: jnp.asarray(rng.normal(size=(8, 8)), jnp.float32) for key in 'ab'
  }
  found = compiled_cost(jax.jit(function), tree)
  assert found == compiled_cost(
    function,
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree),
  )
  np.testing.assert_allclose(found.flops, 2 * 8**3)


def test_what_only_moves_costs_nothing():
  assert compiled_cost(lambda x: x.T, shape(4, 3)).flops == 0


@pytest.mark.parametrize('name', ['cost_analysis', 'memory_analysis'])
def test_a_device_that_tells_nothing_is_named(monkeypatch, name):
  monkeypatch.setattr(jax.stages.Compiled, name, lambda _: None)
  with pytest.raises(NotImplementedError, match='cpu does not tell'):
    compiled_cost(lambda x: x + 1, shape(2))


@pytest.mark.parametrize('function', [attention_share, block_flops])
def test_misuse_is_named(function):
  with pytest.raises(ValueError, match='tokens=0'):
    function(0, 64)
  with pytest.raises(ValueError, match='features=0'):
    function(49, 0)
  with pytest.raises(ValueError, match='ratio=-1'):
    function(49, 64, ratio=-1.0)


@pytest.mark.parametrize('kept', [-0.1, 1.1, float('nan')])
def test_a_share_out_of_range_is_named(kept):
  with pytest.raises(ValueError, match='kept='):
    block_flops(49, 64, kept=kept)
