"""Attention over chosen blocks and means of the others, against float64."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from msba_jax import layers
from msba_jax.layers import block_means
from tests.layers.distributed_test import ROWS, over_mesh
from tests.layers.sparse_test import arrays, token_mask


def averaged_logits(queries, keys, mask, size, scale):
  """Scores (h, n, m): exact under the mask, means of a block elsewhere."""
  logits = scale * np.einsum('nhd,mhd->hnm', queries, keys)
  averaged = logits.copy()
  for start in range(0, logits.shape[-1], size):
    part = slice(start, start + size)
    averaged[..., part] = logits[..., part].mean(-1, keepdims=True)
  return np.where(mask, logits, averaged), logits


def softmax(logits):
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def reference(queries, keys, values, mask, size, scale):
  """Messages of one leading index in float64."""
  queries, keys, values = (
    np.asarray(x, np.float64) for x in (queries, keys, values)
  )
  logits, _ = averaged_logits(queries, keys, mask, size, scale)
  return np.einsum('hnm,mhf->nhf', softmax(logits), values)


@pytest.mark.usefixtures('steps')
@hypothesis.given(
  n=st.sampled_from([1, 6, 11]), m=st.sampled_from([1, 9, 12]),
  block=st.sampled_from([(2, 3), (4, 2), (1, 1), (16, 16)]),
  keep=st.integers(1, 5), split=st.booleans(), large=st.booleans(),
  seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_reference(n, m, block, keep, split, large, seed):
  rng = np.random.default_rng(seed)
  queries, keys, values = arrays(rng, n, m, lead=(2,))
  queries = queries * (30 if large else 1)
  parts = {1: 1, 2: 2, 3: 3, 16: 4}[block[1]] if split else 1
  size = block[1] // parts
  shape = (2, 2, -(-n // block[0]), keep)
  # From −1, which names nothing, to one past the end.
  indices = jnp.asarray(rng.integers(-1, -(-m // block[1]) + 1, shape))
  found = jax.jit(
    functools.partial(layers.attend_blocks_and_means, block=block, parts=parts)
  )(queries, keys, values, indices)
  mask = np.asarray(token_mask(indices, block, n, m))
  for i in range(2):
    expected = reference(queries[i], keys[i], values[i], mask[i], size, 0.5)
    np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-4)


def test_all_blocks_are_dense_attention_and_none_are_means(rng):
  given = arrays(rng, 8, 8)
  attend = functools.partial(layers.attend_blocks_and_means, block=2)
  every = jnp.tile(jnp.arange(4), (4, 1))
  np.testing.assert_allclose(
    attend(*given, every), layers.attend(*given), atol=2e-6
  )
  queries, *read = given
  means = (x.reshape(4, 2, *x.shape[1:]).mean(1) for x in read)
  np.testing.assert_allclose(
    attend(*given, jnp.full((4, 1), -1)),
    layers.attend(queries, *means),
    atol=2e-6,
  )


def test_blocks_of_equal_keys_need_not_be_named(rng):
  queries, keys, values = arrays(rng, 6, 8)
  keys = jnp.repeat(keys[::2], 2, axis=0)
  indices = jnp.array([[0], [-1], [3]])
  np.testing.assert_allclose(
    layers.attend_blocks_and_means(queries, keys, values, indices, block=2),
    layers.attend(queries, keys, values),
    atol=2e-6,
  )


def test_variants(variant, rng):
  given = arrays(rng, 6, 8)
  indices = jnp.array([[0, 3], [3, -1], [1, 2]])
  found = variant(functools.partial(layers.attend_blocks_and_means, block=2))(
    *given, indices
  )
  mask = np.asarray(token_mask(indices, (2, 2), 6, 8))
  np.testing.assert_allclose(
    found, reference(*given, mask, 2, 0.5), rtol=1e-5, atol=1e-5
  )


@pytest.mark.usefixtures('steps')
def test_gradients_equal_finite_differences(rng):
  given = arrays(rng, 6, 7, d=2, f=2)
  indices = jnp.array([[0, 3], [3, -1], [-1, -1]])
  attend = jax.jit(
    lambda *given: layers.attend_blocks_and_means(*given, indices, block=2)
  )
  check_grads(attend, given, 1, ['rev'], rtol=2e-2, atol=2e-2)
  gradients = jax.grad(lambda *x: jnp.sum(attend(*x) ** 3), (0, 1, 2))(*given)
  chex.assert_tree_all_finite(gradients)
  for gradient in gradients:
    assert np.all(np.asarray(gradient) != 0), 'means have a gradient'


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_the_result_has_the_dtype_of_the_values(rng, dtype):
  given = [x.astype(dtype) for x in arrays(rng, 6, 8)]
  indices = jnp.array([[0, 3], [3, -1], [1, 2]])
  found = layers.attend_blocks_and_means(*given, indices, block=2)
  chex.assert_type(found, dtype)
  exact = (x.astype(jnp.float32) for x in given)
  np.testing.assert_allclose(
    found.astype(jnp.float32),
    layers.attend_blocks_and_means(*exact, indices, block=2),
    atol=3e-2,
  )


def test_shares_of_all_devices_are_gathered(rng):
  given = arrays(rng, 16, 16)
  indices = jnp.asarray(rng.integers(-1, 8, (8, 2)))
  attend = functools.partial(layers.attend_blocks_and_means, block=2)
  spread = over_mesh(layers.gathered(attend, 'images'), 8, ROWS)
  np.testing.assert_allclose(
    jax.jit(spread)(*given, indices), attend(*given, indices), atol=2e-6
  )
  with pytest.raises(TypeError, match='use gathered'):
    layers.ring(layers.attend_blocks_and_means, 'images')


@hypothesis.given(
  i=st.sampled_from([1, 5]), block=st.sampled_from([1, 2, 4]),
  lead=st.sampled_from([(), (3,)]), size=st.sampled_from([1e-3, 1.0, 10.0]),
  seed=st.integers(0, 99),
)  # fmt: skip
def test_weights_by_block_equal_the_reference(i, block, lead, size, seed):
  rng = np.random.default_rng(seed)
  queries, keys, _ = arrays(rng, i, 8, lead=lead)
  queries = size * queries
  # What a score is off by grows with it.
  rtol = 1e-5 * max(size, 1)
  weights, means, lost = jax.jit(
    functools.partial(layers.weights_by_block, block=block, scale=0.7)
  )(queries, keys)
  for place in np.ndindex(lead):
    asking, answering = (
      np.asarray(x[place], np.float64) for x in (queries, keys)
    )
    averaged, logits = averaged_logits(asking, answering, False, block, 0.7)
    shape = (2, i, 8 // block, block)
    np.testing.assert_allclose(
      weights[place], softmax(logits).reshape(shape), rtol=rtol, atol=1e-6
    )
    total = np.exp(logits).sum(-1, keepdims=True)
    of_means = (np.exp(averaged) / total).reshape(shape)
    np.testing.assert_allclose(means[place], of_means[..., 0], rtol=rtol)
    expected = (softmax(logits).reshape(shape) - of_means).sum(axis=-1)
    # Of scores that are nearly equal, a difference of weights has no digit.
    np.testing.assert_allclose(lost[place], expected, rtol=5e-3, atol=1e-11)
  assert lost.min() > -1e-9


def test_what_is_lost_has_a_gradient_where_scores_are_nearly_equal(rng):
  queries, keys, _ = arrays(rng, 3, 8)
  queries = 1e-3 * queries

  def lost(queries):
    return layers.weights_by_block(queries, keys, block=4).lost

  change = jnp.asarray(rng.normal(size=lost(queries).shape), jnp.float32)
  found = jax.grad(lambda x: jnp.sum(lost(x) * change))(queries)
  # It is quadratic in the queries: x · ∂f = 2 f.
  np.testing.assert_allclose(
    jnp.sum(found * queries), 2 * jnp.sum(lost(queries) * change), rtol=2e-2
  )


def test_the_divergence_is_that_of_the_normalisers(rng):
  """What `weights_by_block` says is left over is KL(p‖dense)."""
  queries, keys, _ = arrays(rng, 3, 8)
  asking, answering = (np.asarray(x, np.float64) for x in (queries, keys))
  kept = rng.random((2, 3, 4)) < 0.5
  mask = np.repeat(kept, 2, axis=-1)
  averaged, logits = averaged_logits(asking, answering, mask, 2, 0.5)
  sparse, dense = softmax(averaged), softmax(logits)
  expected = np.sum(sparse * np.log(sparse / dense), axis=-1)
  weights, means, _ = layers.weights_by_block(queries, keys, block=2)
  mass = np.where(kept, weights.sum(-1), 2 * means).sum(-1)
  np.testing.assert_allclose(-np.log(mass), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures('unchecked')
def test_wrong_shapes_are_named(rng):
  queries, keys, values = arrays(rng, 6, 8)
  with pytest.raises(ValueError, match='block_indices must broadcast'):
    block_means.attend_blocks_and_means(
      queries, keys, values, jnp.zeros((3, 2), jnp.int32), block=3
    )
  with pytest.raises(ValueError, match='parts=3 must divide the 2 keys'):
    block_means.attend_blocks_and_means(
      queries, keys, values, jnp.zeros((3, 2), jnp.int32), block=2, parts=3
    )
  with pytest.raises(ValueError, match='block=3 must divide the 8 keys'):
    block_means.weights_by_block(queries, keys, block=3)
