"""Tests of `msba_jax.layers.heads`."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.layers import heads


def test_alignment_is_the_attention_along_the_graph(rng, variant):
  weights, influence = rng.random((2, 3, 4, 5)), rng.random((2, 4, 5))
  found = variant(heads.head_alignment)(
    jnp.asarray(weights, jnp.float32), jnp.asarray(influence, jnp.float32)
  )
  expected = np.zeros((2, 4, 3))
  for b, h, n, m in np.ndindex(weights.shape):
    expected[b, n, h] += weights[b, h, n, m] * influence[b, n, m]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_best_heads_are_kept_and_all_have_a_gradient(rng):
  scores = jnp.asarray(rng.normal(size=(7, 8)), jnp.float32)
  found = np.asarray(heads.select_heads(scores, 3))
  np.testing.assert_allclose(found.sum(axis=-1), 8, rtol=1e-6)
  for row, factors in zip(np.asarray(scores), found, strict=True):
    best = np.argsort(-row)[:3]
    np.testing.assert_allclose(factors[best], 8 / 3, rtol=1e-6)
    assert np.count_nonzero(factors) == 3
  weight = jnp.asarray(rng.normal(size=(7, 8)), jnp.float32)
  hard = jax.grad(lambda s: jnp.sum(weight * heads.select_heads(s, 3)))(scores)
  soft = jax.grad(lambda s: jnp.sum(weight * 8 * jax.nn.softmax(s)))(scores)
  np.testing.assert_allclose(hard, soft, rtol=1e-5, atol=1e-6)


def test_all_heads_are_left_as_they_are(rng):
  scores = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
  np.testing.assert_array_equal(heads.select_heads(scores, 6), 1)


@pytest.mark.parametrize('keep', [0, 5, -1])
def test_there_are_not_so_many_heads(keep):
  with pytest.raises(ValueError, match='must be 1 to 4'):
    heads.select_heads(jnp.zeros((2, 4)), keep)


@pytest.mark.parametrize(
  ('prompt', 'expected'),
  [
    ({'point': (0.0, 0.0)}, [[1, 0, 0], [0, 0, 0]]),
    ({'point': (1.0, 1.0)}, [[0, 0, 0], [0, 0, 1]]),
    ({'box': (0.0, 0.0, 0.5, 0.5)}, [[1, 1, 0], [0, 0, 0]]),
    ({'box': (0.4, 0.7, 0.6, 1.0)}, [[0, 0, 1], [0, 0, 1]]),
    ({'box': (0.0, 0.0, 1.0, 1.0)}, [[1, 1, 1], [1, 1, 1]]),
    ({'mask': np.eye(6, dtype=bool)}, [[1, 1, 0], [0, 1, 1]]),
    ({'mask': np.array([[False], [True]])}, [[0, 0, 0], [1, 1, 1]]),
  ],
)
def test_tokens_of_a_prompt(prompt, expected):
  found = heads.prompt_tokens((2, 3), **prompt)
  np.testing.assert_array_equal(found.reshape(2, 3), np.array(expected, bool))


@hypothesis.given(
  grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
  size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
  density=st.sampled_from([0.02, 0.3, 1.0]),
  seed=st.integers(0, 99),
)
def test_tokens_of_masks_are_those_of_each(grid, size, density, seed):
  rng = np.random.default_rng(seed)
  masks = rng.random((4, *size)) < density
  masks[0] = False
  masks[1:, rng.integers(size[0]), rng.integers(size[1])] = True
  found = np.asarray(heads.tokens_of_masks(jnp.asarray(masks), grid))
  assert found.dtype == bool
  assert not found[0].any()
  for tokens, mask in zip(found[1:], masks[1:], strict=True):
    np.testing.assert_array_equal(tokens, heads.prompt_tokens(grid, mask=mask))


def test_tokens_of_masks_compiled(rng, variant):
  masks = rng.random((3, 9, 5)) < 0.1
  masks[:, 4, 4] = True
  found = variant(lambda x: heads.tokens_of_masks(x, (2, 3)))(
    jnp.asarray(masks)
  )
  expected = [heads.prompt_tokens((2, 3), mask=mask) for mask in masks]
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ('prompt', 'said'),
  [
    ({}, 'exactly one'),
    ({'point': (0.0, 0.0), 'box': (0.0, 0.0, 1.0, 1.0)}, 'exactly one'),
    ({'point': (1.2, 0.0)}, 'from 0 to 1'),
    ({'box': (0.5, 0.0, 0.4, 1.0)}, 'ascending'),
    ({'mask': np.zeros((4, 4), bool)}, 'mask is empty'),
  ],
)
def test_a_wrong_prompt_is_named(prompt, said):
  with pytest.raises(ValueError, match=said):
    heads.prompt_tokens((2, 3), **prompt)


def test_alignment_with_a_prompt(rng, variant):
  weights = rng.random((2, 3, 4, 6))
  weights /= weights.sum(axis=-1, keepdims=True)
  tokens = np.array([[1, 0, 0, 1, 0, 0], [1] * 6], bool)
  found = variant(heads.prompt_alignment)(
    jnp.asarray(weights, jnp.float32), jnp.asarray(tokens)
  )
  expected = np.stack(
    [weights[i][..., tokens[i]].sum(axis=-1).mean(axis=-1) for i in range(2)]
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(found[1], 1, rtol=1e-5)
