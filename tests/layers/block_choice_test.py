"""Tests of `msba_jax.layers.block_choice`."""

import functools

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.layers import block_choice
from tests.layers.sparse_test import arrays


@pytest.mark.parametrize(('n', 'm'), [(6, 8), (7, 7)])
def test_block_topk_ranks_the_products_of_means(variant, rng, n, m):
  queries, keys, _ = arrays(rng, n, m, lead=(2,))
  found = variant(
    functools.partial(block_choice.block_topk, block=(3, 2), keep=3)
  )(queries, keys)

  def means(x, size):
    x = np.asarray(x, np.float64)
    starts = range(0, x.shape[1], size)
    return np.stack([x[:, i : i + size].mean(1) for i in starts], axis=1)

  scores = np.einsum(
    'bihd,bjhd->bhij', means(queries, 3), means(keys, 2)
  )  # fmt: skip
  np.testing.assert_array_equal(
    found, np.argsort(-scores, axis=-1, kind='stable')[..., :3]
  )


def test_block_topk_chooses_nothing_that_is_masked(rng):
  queries, keys, _ = arrays(rng, 6, 8)
  mask = jnp.asarray(rng.random((3, 4)) < 0.6).at[1].set(False)
  found = np.asarray(
    block_choice.block_topk(queries, keys, block=2, keep=4, mask=mask)
  )
  chosen = np.asarray(block_choice.block_mask(jnp.asarray(found), 4))
  np.testing.assert_array_equal(chosen, np.broadcast_to(mask, chosen.shape))
  assert np.all(found[:, 1] == -1)


@hypothesis.given(seed=st.integers(0, 99), keep=st.integers(1, 5))
def test_the_mask_of_a_choice_and_its_share(seed, keep):
  rng = np.random.default_rng(seed)
  indices = rng.integers(-1, 5, (2, 3, keep))
  mask = np.zeros((2, 3, 4), bool)
  for place in np.ndindex(indices.shape):
    if 0 <= indices[place] < 4:
      mask[place[0], place[1], indices[place]] = True
  indices = jnp.asarray(indices)
  np.testing.assert_array_equal(block_choice.block_mask(indices, 4), mask)
  np.testing.assert_allclose(
    block_choice.kept_share(indices, 4), mask.mean((1, 2)), atol=1e-7
  )


@pytest.mark.usefixtures('unchecked')
def test_wrong_arguments_are_named(rng):
  queries, keys, _ = arrays(rng, 6, 8)
  choose = functools.partial(block_choice.block_topk, queries, keys, block=2)
  with pytest.raises(ValueError, match='keep=5 must be between 1 and the 4'):
    choose(keep=5)
  with pytest.raises(TypeError, match='mask must be Boolean'):
    choose(keep=2, mask=jnp.ones((3, 4)))
