"""Tests of `msba_jax.layers.masks` and `msba_jax.layers.normalize`."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from msba_jax.layers import masks, normalize


def test_self_mask_is_false_on_the_diagonal_alone():
  np.testing.assert_array_equal(masks.self_mask(4), ~np.eye(4, dtype=bool))


def test_padding_mask_is_a_row():
  valid = jnp.array([[True, False], [True, True]])
  assert masks.padding_mask(valid).shape == (2, 1, 2)
  np.testing.assert_array_equal(masks.padding_mask(valid)[:, 0], valid)


def test_same_image_mask(rng):
  asking, answering = rng.integers(0, 3, 5), rng.integers(0, 3, 7)
  np.testing.assert_array_equal(
    masks.same_image_mask(jnp.asarray(asking), jnp.asarray(answering)),
    asking[:, None] == answering[None],
  )


@hypothesis.given(
  n=st.integers(1, 5), m=st.integers(1, 6), seed=st.integers(0, 99),
  data=st.data(),
)  # fmt: skip
def test_neighbour_mask_keeps_the_k_most_similar(n, m, seed, data):
  k = data.draw(st.integers(0, m))
  rng = np.random.default_rng(seed)
  # Few distinct values, so that ties are the rule.
  similarity = rng.integers(0, 3, (2, n, m)).astype(np.float32)
  similarity[rng.random(similarity.shape) < 0.2] = -np.inf
  expected = np.zeros(similarity.shape, bool)
  order = np.argsort(-similarity, axis=-1, kind='stable')[..., :k]
  np.put_along_axis(expected, order, True, -1)
  expected &= similarity > -np.inf
  for function in (
    masks.neighbour_mask,
    jax.jit(masks.neighbour_mask, static_argnums=1),
  ):
    np.testing.assert_array_equal(
      function(jnp.asarray(similarity), k), expected
    )


@pytest.mark.usefixtures('unchecked')
def test_neighbour_mask_names_a_wrong_k():
  with pytest.raises(ValueError, match=r'k=4 must lie in 0 … 3'):
    masks.neighbour_mask(jnp.zeros((2, 3)), 4)


@pytest.mark.parametrize('axis', [-1, 0])
@pytest.mark.parametrize('size', [1e-3, 1.0, 1e30])
def test_normalize_gives_unit_norm(variant, rng, axis, size):
  inputs = jnp.asarray(size * rng.normal(size=(4, 5)), jnp.float32)
  vectors = np.asarray(inputs, np.float64)
  expected = vectors / np.linalg.norm(vectors, axis=axis, keepdims=True)
  unit = variant(lambda x: normalize.safe_normalize(x, axis=axis))(inputs)
  np.testing.assert_allclose(unit, expected, atol=1e-6)


def test_normalize_zero_is_zero_with_a_finite_gradient(variant):
  zero = jnp.zeros((2, 3))
  assert np.all(np.asarray(normalize.safe_normalize(zero)) == 0)
  gradient = variant(jax.grad(lambda x: jnp.sum(normalize.safe_normalize(x))))(
    zero
  )
  chex.assert_tree_all_finite(gradient)


def test_normalize_gradient_and_dtype(rng):
  inputs = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
  check_grads(
    jax.jit(normalize.safe_normalize), (inputs,), 2, rtol=2e-2, atol=2e-2
  )
  half = normalize.safe_normalize(inputs.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16


def test_causal_mask_is_true_on_the_diagonal_and_below():
  np.testing.assert_array_equal(masks.causal_mask(4), np.tri(4, dtype=bool))
