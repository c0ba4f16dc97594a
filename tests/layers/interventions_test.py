"""Tests of `msba_jax.layers.interventions` against float64 NumPy."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.layers import causal, interventions
from tests.layers.causal_test import float32, softmax


def without(weights, values, m):
  """Messages (h, n, f) when image m is not in the context, float64."""
  rest = weights.copy()
  rest[:, :, m] = 0
  total = rest.sum(axis=-1, keepdims=True)
  rest = np.divide(rest, total, out=np.zeros_like(rest), where=total > 0)
  return np.einsum('hnm,mhf->hnf', rest, values)


@hypothesis.given(
  h=st.integers(1, 3),
  n=st.integers(1, 5),
  m=st.integers(1, 6),
  f=st.integers(1, 4),
  scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
  offset=st.sampled_from([0.0, 10.0]),
  masked=st.booleans(),
  seed=st.integers(0, 2**31),
)
def test_leaving_one_out_is_a_pass_without_it(
  h, n, m, f, scale, offset, masked, seed
):
  rng = np.random.default_rng(seed)
  scores = scale * rng.normal(size=(h, n, m))
  if masked:
    mask = rng.random((n, m)) < 0.5
    scores = np.where(mask, scores, -np.inf)
  with np.errstate(invalid='ignore'):
    weights = np.nan_to_num(softmax(scores))
  # What the function is given is exact: the reference reads the same numbers.
  weights = weights.astype(np.float32)
  weights[weights < np.finfo(np.float32).tiny] = 0  # XLA counts them as zero
  values = (rng.normal(size=(m, h, f)) + offset).astype(np.float32)
  found = interventions.leave_one_out_effect(*float32(weights, values))
  weights, values = weights.astype(np.float64), values.astype(np.float64)
  total = weights.sum(axis=-1, keepdims=True)
  weights = np.divide(
    weights, total, out=np.zeros_like(weights), where=total > 0
  )
  whole = np.einsum('hnm,mhf->hnf', weights, values)
  expected = np.stack(
    [
      ((without(weights, values, i) - whole) ** 2).sum(axis=(0, 2))
      for i in range(m)
    ],
    axis=1,
  )
  size = max(1.0, float((whole**2).sum(axis=(0, 2)).max()))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * size)


def test_an_image_looked_at_alone_leaves_zero():
  weights = jnp.array([[[0.0, 1.0, 0.0]]])
  values = jnp.array([[[5.0]], [[3.0]], [[7.0]]])
  found = interventions.leave_one_out_effect(weights, values)
  np.testing.assert_allclose(found, [[0.0, 9.0, 0.0]], atol=1e-5)


def test_effects_have_gradients_that_are_finite(rng):
  values = jnp.asarray(rng.normal(size=(5, 2, 3)), jnp.float32)

  def total(scores):
    weights = jax.nn.softmax(scores)
    return jnp.sum(interventions.leave_one_out_effect(weights, values))

  for scale in (0.1, 30.0):
    scores = jnp.asarray(scale * rng.normal(size=(2, 4, 5)), jnp.float32)
    gradient = jax.grad(total)(scores)
    assert np.isfinite(gradient).all()
  assert np.isfinite(jax.grad(total)(jnp.zeros((2, 4, 5)))).all()


def test_an_intervention_is_a_pass_with_another_value(rng, variant):
  weights = softmax(rng.normal(size=(2, 3, 4)))
  values, replaced = rng.normal(size=(2, 4, 2, 5))
  found = variant(interventions.intervention_effect)(
    *float32(weights, values, replaced)
  )
  whole = np.einsum('hnm,mhf->hnf', weights, values)
  for m in range(4):
    changed = values.copy()
    changed[m] = replaced[m]
    message = np.einsum('hnm,mhf->hnf', weights, changed)
    expected = ((message - whole) ** 2).sum(axis=(0, 2))
    np.testing.assert_allclose(found[:, m], expected, rtol=1e-5)


def test_perturbations_have_the_length_asked_for(rng):
  features = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)
  keys = jax.random.split(jax.random.key(0), 200)
  drawn = jax.vmap(lambda k: interventions.perturbed_features(k, features))(
    keys
  )
  moved = np.linalg.norm(drawn - features[None], axis=-1)
  lengths = np.linalg.norm(features, axis=-1)
  np.testing.assert_allclose(moved, np.tile(0.1 * lengths, (200, 1)), rtol=1e-4)
  assert np.abs(np.mean(drawn - features[None], axis=0)).max() < 0.1
  zero = interventions.perturbed_features(jax.random.key(0), jnp.zeros((2, 3)))
  np.testing.assert_array_equal(zero, 0)


def test_draws_agree_with_the_intervention(rng):
  """A value that is linear in the features, the weights held fixed."""
  features = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
  project = jnp.asarray(rng.normal(size=(6, 2, 3)), jnp.float32)
  weights = jnp.asarray(softmax(rng.normal(size=(2, 5, 4))), jnp.float32)

  def values(x):
    return jnp.einsum('md,dhf->mhf', x, project)

  drawn = interventions.perturbed_features(jax.random.key(1), features)
  found = interventions.intervention_effect(
    weights, values(features), values(drawn)
  )
  for m in range(4):
    moved = values(features.at[m].set(drawn[m]))
    change = jnp.einsum('hnm,mhf->hnf', weights, moved - values(features))
    np.testing.assert_allclose(
      found[:, m], jnp.sum(change**2, axis=(0, 2)), rtol=1e-4
    )


def test_counterfactual_attention_equals_the_reference(rng, variant):
  mask = np.array([[True, True, False], [True, True, True], [False] * 3])
  weights = np.where(mask, softmax(rng.normal(size=(2, 3, 3))), 0)
  total = weights.sum(axis=-1, keepdims=True)
  weights = np.divide(
    weights, total, out=np.zeros_like(weights), where=total > 0
  )
  effects = rng.random((3, 3))
  found = variant(interventions.counterfactual_attention)(
    *float32(weights, effects), temperature=0.7, mix=0.6, mask=jnp.asarray(mask)
  )
  expected = np.zeros((3, 3))
  for n in range(2):
    row = effects[n, mask[n]]
    expected[n, mask[n]] = softmax(row / row.mean() / 0.7)
  np.testing.assert_allclose(found, 0.6 * weights + 0.4 * expected, atol=1e-6)
  none = interventions.counterfactual_attention(
    *float32(weights, 0 * effects), temperature=0.7, mix=0.6,
    mask=jnp.asarray(mask),
  )  # fmt: skip
  np.testing.assert_allclose(np.sum(none, axis=-1), [[1, 1, 0]] * 2, atol=1e-6)


@pytest.mark.parametrize('kind', ['permuted', 'uniform', 'random'])
def test_counterfactual_weights_are_weights(rng, kind):
  mask = rng.random((6, 8)) < 0.6
  mask[:, 0], mask[2] = True, False
  weights = jnp.asarray(softmax(rng.normal(size=(2, 6, 8))), jnp.float32)
  found = interventions.counterfactual_weights(
    jax.random.key(0), weights, kind=kind, mask=jnp.asarray(mask)
  )
  assert (np.asarray(found)[:, ~mask] == 0).all()
  total = np.sum(found, axis=-1)
  np.testing.assert_allclose(total[:, mask.any(axis=1)], 1, atol=1e-6)
  np.testing.assert_array_equal(total[:, 2], 0)
  if kind == 'permuted':
    rows = interventions.counterfactual_weights(jax.random.key(0), weights)
    assert np.abs(rows - weights).max() > 0.1
    np.testing.assert_allclose(
      np.sort(rows, axis=2), np.sort(weights, axis=2), atol=1e-6
    )
    seen = mask.any(axis=0)
    kept = interventions.counterfactual_weights(
      jax.random.key(0), weights, mask=jnp.asarray(seen[None])
    )
    expected = np.sort(weights[..., seen], axis=2)
    expected /= expected.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(
      np.sort(kept[..., seen], axis=2), expected, atol=1e-6
    )


def test_what_nobody_looks_at_has_no_say_in_the_effects(rng):
  weights = softmax(rng.normal(size=(2, 3, 5)))
  weights[..., 3] = 0
  weights = jnp.asarray(weights / weights.sum(-1, keepdims=True), jnp.float32)
  values = jnp.asarray(rng.normal(size=(5, 2, 4)), jnp.float32)
  effects = interventions.leave_one_out_effect(weights, values)
  for size in (1e3, 1e6):
    other = interventions.leave_one_out_effect(weights, values.at[3].set(size))
    np.testing.assert_array_equal(other, effects)


@pytest.mark.usefixtures('unchecked')
def test_a_kind_that_there_is_not():
  with pytest.raises(ValueError, match="'permuted', 'uniform' or 'random'"):
    interventions.counterfactual_weights(
      jax.random.key(0), jnp.ones((1, 2, 2)), kind='none'
    )


def test_they_are_found_beside_the_graph():
  assert causal.leave_one_out_effect is interventions.leave_one_out_effect


def test_a_row_of_next_to_nothing_has_a_finite_gradient():
  """All the weight of the first row is put where it is masked."""
  weights = jnp.array([[[0, 1, 1e-30], [0, 0, 1], [1, 1e-30, 0]]])
  off = ~jnp.eye(3, dtype=bool)

  def total(weights, seed):
    found = interventions.counterfactual_weights(
      jax.random.key(seed), weights, mask=off
    )
    return jnp.sum(found**2)

  for seed in range(6):
    gradient = jax.jit(jax.grad(total))(weights, seed)
    assert np.all(np.abs(gradient) < 1e7)
