"""Tests of `msba_jax.losses.similarity`."""

import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.losses import similarity

LABELS = jnp.array([2, 0, 2, 2])
VALID = jnp.array([True, True, True, False])


def test_pairs_divide_what_is_off_the_diagonal():
  positive = np.asarray(similarity.positive_pairs(LABELS))
  negative = np.asarray(similarity.negative_pairs(LABELS))
  assert np.array_equal(positive ^ negative, ~np.eye(4, dtype=bool))
  assert np.flatnonzero(positive[0]).tolist() == [2, 3]
  assert np.flatnonzero(negative[0]).tolist() == [1]


def test_padding_is_in_no_pair():
  positive = np.asarray(similarity.positive_pairs(LABELS, valid=VALID))
  negative = np.asarray(similarity.negative_pairs(LABELS, valid=VALID))
  for mask in (positive, negative):
    assert not np.any(mask[3])
    assert not np.any(mask[:, 3])
  assert positive.sum() == 2
  assert negative.sum() == 4


def test_targets_name_the_class():
  targets = similarity.class_targets(
    jnp.array([1, -1, 3, 0]), 3, valid=jnp.array([True, True, True, False])
  )
  assert np.argwhere(np.asarray(targets)).tolist() == [[0, 1]]


def test_unit_vectors_have_unit_norm_and_padding_is_zero(rng):
  vectors = jnp.asarray(rng.normal(size=(4, 5)), jnp.bfloat16)
  units = similarity.unit_vectors(vectors, valid=VALID)
  assert units.dtype == jnp.float32
  np.testing.assert_allclose(
    jnp.linalg.norm(units, axis=1), [1, 1, 1, 0], atol=1e-6
  )


@pytest.mark.usefixtures('unchecked')
def test_misuse_is_named():
  for function in (similarity.positive_pairs, similarity.negative_pairs):
    with pytest.raises(ValueError, match=r'one per image.*\(2,\).*\(4,\)'):
      function(LABELS, valid=VALID[:2])
    with pytest.raises(TypeError, match='valid must be Boolean'):
      function(LABELS, valid=LABELS)
