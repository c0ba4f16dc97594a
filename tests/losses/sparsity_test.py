"""Tests of `msba_jax.losses.sparsity` against float64 NumPy."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from msba_jax import losses
from msba_jax.losses import sparsity

# What each term reads of the windows.
READS = {
  'ratio': ('kept',),
  'mass': ('divergence',),
  'width': ('breadth',),
  'narrowing': ('widths', 'lost'),
}
NAMES = [name for names in READS.values() for name in names]


@pytest.fixture
def out(rng):
  vectors = {
    key: jnp.asarray(rng.normal(size=(size, 4)), jnp.float32)
    for key, size in {'solo': 6, 'context': 6, 'proxies': 3}.items()
  }
  told = {
    name: jnp.asarray(
      rng.random((2, 6, 3) if name in READS['narrowing'] else (2, 6)),
      jnp.float32,
    )
    for name in NAMES
  }
  return vectors | {'aux': {'msw': told}}


@pytest.fixture
def batch():
  return {
    'label': jnp.array([0, 0, 1, 1, 2, 2], jnp.int32),
    'valid': jnp.array([True] * 5 + [False]),
  }


def rows_and_masks(rng, *shape):
  weights = rng.dirichlet(np.full(shape[-1], 0.5), shape[:-1])
  return jnp.asarray(weights, jnp.float32), jnp.asarray(rng.random(shape) < 0.5)


def divergence(weights, kept):
  """KL(sparse‖dense) of one row, float64; the sum is over what is kept."""
  dense = np.asarray(weights, np.float64)
  dense = dense / dense.sum()
  sparse = np.where(kept, dense, 0)
  sparse = sparse / sparse.sum()
  here = sparse > 0
  return np.sum(sparse[here] * np.log(sparse[here] / dense[here]))


@hypothesis.given(
  shape=st.sampled_from([(1, 1), (5,), (2, 3, 4)]),
  target=st.sampled_from([0.1, 0.25, 1.0]),
  mask=st.booleans(),
  seed=st.integers(0, 99),
)
def test_the_ratio_equals_the_reference(shape, target, mask, seed):
  rng = np.random.default_rng(seed)
  kept = rng.random(shape)
  kept = kept < 0.5 if mask else kept
  valid = rng.random(shape) < 0.7
  found = losses.ratio_loss(jnp.asarray(kept), target, valid=jnp.asarray(valid))
  expected = 2 * (kept[valid].mean() - target) ** 2 if valid.any() else 0
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(
    losses.ratio_loss(jnp.asarray(kept), target),
    2 * (kept.mean() - target) ** 2,
    rtol=1e-4,
    atol=1e-7,
  )


def test_the_mean_has_a_target_and_not_each(rng):
  kept = jnp.array([0.1, 0.4, 9.0])
  valid = jnp.array([True, True, False])
  value, gradient = jax.value_and_grad(
    lambda x: losses.ratio_loss(x, 0.25, valid=valid)
  )(kept)
  np.testing.assert_allclose(value, 0, atol=1e-12)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)
  gradient = jax.grad(lambda x: losses.ratio_loss(x, 0.15, valid=valid))(kept)
  np.testing.assert_allclose(gradient, [0.2, 0.2, 0], rtol=1e-5)


@pytest.mark.parametrize('target', [0.0, 1.5, float('nan')])
def test_a_target_that_is_no_share_is_named(target):
  with pytest.raises(ValueError, match='target='):
    losses.ratio_loss(jnp.zeros(3), target)
  with pytest.raises(ValueError, match='target='):
    losses.nexus_losses(losses.proxy_anchor, target=target)
  with pytest.raises(ValueError, match='width_target='):
    losses.nexus_losses(losses.proxy_anchor, width_target=target)


@hypothesis.given(
  shape=st.sampled_from([(1, 1), (3, 6), (2, 2, 5)]),
  number=st.booleans(),
  seed=st.integers(0, 99),
)
def test_the_divergence_equals_the_reference(shape, number, seed):
  rng = np.random.default_rng(seed)
  weights, kept = rows_and_masks(rng, *shape)
  kept = kept.at[..., 0].set(True)
  found = losses.kept_mass_loss(
    weights, kept.astype(jnp.float32) if number else kept
  )
  assert found.shape == shape[:-1]
  for place in np.ndindex(shape[:-1]):
    expected = divergence(weights[place], kept[place])
    # A millionth is added to what is kept.
    size = np.where(kept[place], weights[place], 0).sum()
    np.testing.assert_allclose(
      found[place], expected, rtol=1e-4, atol=2e-6 / size
    )


def test_what_is_left_to_its_mean_keeps_weight(rng):
  weights, kept = rows_and_masks(rng, 3, 5)
  means = weights * jnp.asarray(rng.random((3, 5)), jnp.float32)
  valid = jnp.array([True, False, True])
  found = losses.kept_mass_loss(
    weights, kept, means=means.at[1].set(jnp.nan), valid=valid
  )
  mass = np.where(kept, weights, means).sum(-1)
  expected = np.where(valid, -np.log(mass), 0)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6)


def test_masks_are_shared_by_leading_axes(rng, variant):
  weights, _ = rows_and_masks(rng, 2, 3, 4)
  kept = jnp.asarray(rng.random((1, 3, 4)), jnp.float32)
  np.testing.assert_allclose(
    variant(losses.kept_mass_loss)(weights, kept),
    -np.log(np.sum(np.asarray(weights) * np.asarray(kept), axis=-1)),
    rtol=1e-5,
  )


def test_rows_that_keep_nothing_all_or_are_empty(rng):
  weights, _ = rows_and_masks(rng, 4, 5)
  weights = weights.at[2].set(0)
  kept = jnp.array([[False], [True], [True], [False]]) & jnp.ones(
    (4, 5), jnp.bool_
  )
  found = losses.kept_mass_loss(weights, kept)
  np.testing.assert_allclose(found, [13.8155, 0, 0, 13.8155], atol=1e-4)
  gradients = jax.grad(
    lambda w, k: jnp.sum(losses.kept_mass_loss(w, k)), (0, 1)
  )(weights, kept.astype(jnp.float32))
  chex.assert_tree_all_finite(gradients)
  np.testing.assert_array_equal(gradients[0][2], 0)
  # Keeping more is better, the more so the heavier the key.
  assert np.all(np.asarray(gradients[1][0]) < 0)


def reallocated(likely, lost):
  """mean_i Σ_w p_iw (D_iw − mean_j D_jw) of each level, in float64."""
  beside = lost - lost.mean(axis=-2, keepdims=True)
  return [
    np.mean([p @ d for p, d in zip(*of_level, strict=True)])
    for of_level in zip(likely, beside, strict=True)
  ]


@pytest.mark.parametrize('levels', [(), (3,), (2, 1)])
def test_narrowing_equals_the_reference(rng, variant, levels):
  likely = rng.dirichlet(np.ones(3), (*levels, 6))
  lost = rng.random((*levels, 6, 3))
  valid = np.array([True, False, True, True, True, False])
  found = variant(losses.narrowing_loss)(
    jnp.asarray(likely, jnp.float32),
    jnp.asarray(lost, jnp.float32).at[..., 1, :].set(jnp.nan),
    valid=jnp.asarray(valid),
  )
  of_levels = reallocated(
    *(x.reshape(-1, 6, 3)[:, valid] for x in (likely, lost))
  )
  np.testing.assert_allclose(found, np.mean(of_levels), rtol=1e-4, atol=1e-7)
  none = jnp.zeros(6, bool)
  found = losses.narrowing_loss(*map(jnp.asarray, (likely, lost)), valid=none)
  assert found == 0


def test_narrowing_moves_images_apart_and_not_together(rng):
  lost = jnp.asarray(rng.random((5, 3)), jnp.float32)
  likely = jnp.full((5, 3), 1 / 3)
  np.testing.assert_allclose(losses.narrowing_loss(likely, lost), 0, atol=1e-7)
  gradient = np.asarray(jax.grad(losses.narrowing_loss)(likely, lost))
  np.testing.assert_allclose(gradient.sum(axis=0), 0, atol=1e-6)
  for of_candidate, by in zip(gradient.T, lost.T, strict=True):
    np.testing.assert_array_equal(np.argsort(of_candidate), np.argsort(by))


@pytest.mark.usefixtures('unchecked')
def test_shapes_that_narrowing_does_not_take_are_named():
  rows = jnp.ones((4, 3))
  with pytest.raises(ValueError, match=r'lost\.shape=\(4, 2\)'):
    losses.narrowing_loss(rows, jnp.ones((4, 2)))
  with pytest.raises(ValueError, match=r'valid\.shape=\(3,\)'):
    losses.narrowing_loss(rows, rows, valid=jnp.ones(3, bool))
  with pytest.raises(TypeError, match=r'valid\.dtype=.*float32'):
    losses.narrowing_loss(rows, rows, valid=jnp.ones(4))


def test_gradients_equal_finite_differences(rng):
  weights, _ = rows_and_masks(rng, 3, 5)
  kept = jnp.asarray(rng.uniform(0.3, 1, (3, 5)), jnp.float32)
  loss = jax.jit(losses.kept_mass_loss)
  check_grads(loss, (weights, kept), 1, ['rev'], rtol=2e-2, atol=2e-2)


def test_permuting_keys_changes_nothing(rng):
  weights, kept = rows_and_masks(rng, 3, 7)
  order = rng.permutation(7)
  np.testing.assert_allclose(
    losses.kept_mass_loss(weights[:, order], kept[:, order]),
    losses.kept_mass_loss(weights, kept),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize('value', [7.0, jnp.inf, jnp.nan])
def test_padded_rows_have_no_influence(rng, value):
  weights = jnp.asarray(rng.dirichlet(np.ones(4), 3), jnp.float32)
  kept = jnp.asarray(rng.random((3, 4)), jnp.float32)
  valid = jnp.array([True, True, False])
  total = jax.value_and_grad(
    lambda w, k: jnp.sum(losses.kept_mass_loss(w, k, valid=valid)), (0, 1)
  )
  expected = total(weights, kept)
  found = total(weights.at[2].set(value), kept.at[2].set(value))
  chex.assert_trees_all_close(found, expected, rtol=1e-6)
  for gradient in found[1]:
    np.testing.assert_array_equal(gradient[2], 0)
    assert np.all(np.asarray(gradient[:2]) != 0)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_losses_are_float32(rng, dtype):
  weights, kept = rows_and_masks(rng, 3, 5)
  found = losses.kept_mass_loss(weights.astype(dtype), kept.at[:, 0].set(True))
  chex.assert_type(found, jnp.float32)
  chex.assert_type(losses.ratio_loss(weights.astype(dtype), 0.5), jnp.float32)


@pytest.mark.usefixtures('unchecked')
def test_misuse_of_valid_is_named():
  rows = jnp.ones((3, 4))
  with pytest.raises(ValueError, match=r'valid\.shape=\(4,\)'):
    losses.kept_mass_loss(rows, rows, valid=jnp.ones(4, bool))
  with pytest.raises(TypeError, match=r'valid\.dtype=.*float32'):
    losses.kept_mass_loss(rows, rows, valid=jnp.ones(3))


def test_the_objective_is_that_of_msba_and_four_terms(out, batch):
  loss = losses.supervised_contrastive
  options = {'consistency': 0.3, 'classification_weight': 0.5}
  terms = losses.nexus_losses(loss, width=2.0, **options)
  base = losses.msba_losses(loss, **options)
  weights = {'ratio': 8.0, 'mass': 1.0, 'width': 2.0, 'narrowing': 30.0}
  assert [(t.name, t.weight) for t in terms] == [
    *((t.name, t.weight) for t in base),
    *weights.items(),
  ]
  total, values = losses.total_loss(terms, out, batch)
  told = {
    name: np.asarray(out['aux']['msw'][name], np.float64)[:, :5]
    for name in NAMES
  }
  # Every level has a budget of its own.
  expected = {
    'ratio': np.mean(2 * (told['kept'].mean(axis=1) - 0.2) ** 2),
    'mass': told['divergence'].mean(),
    'width': np.mean(2 * (told['breadth'].mean(axis=1) - 0.75) ** 2),
    'narrowing': np.mean(reallocated(told['widths'], told['lost'])),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(values[name], value, rtol=1e-4)
  np.testing.assert_allclose(
    total,
    losses.total_loss(base, out, batch)[0]
    + sum(weights[name] * value for name, value in expected.items()),
    rtol=1e-5,
  )


def test_padded_images_have_no_say(out, batch):
  def value(told):
    terms = losses.nexus_losses(losses.proxy_anchor)
    given = out | {'aux': {'msw': told}}
    values = losses.total_loss(terms, given, batch)[1]
    return sum(values[name] for name in READS)

  told = out['aux']['msw']
  spoiled = {key: x.at[:, 5].set(jnp.nan) for key, x in told.items()}
  np.testing.assert_array_equal(value(spoiled), value(told))
  for name, gradient in jax.grad(value)(told).items():
    np.testing.assert_array_equal(gradient[:, 5], 0)
    # What is lost is a measurement.
    assert np.all((np.asarray(gradient[:, :5]) != 0) == (name != 'lost'))


def test_one_number_for_all_is_taken(out, batch):
  told = {'kept': jnp.array(0.5), 'divergence': jnp.array(0.3)}
  terms = losses.nexus_losses(
    losses.proxy_anchor, target=0.75, width=0.0, narrowing=0.0
  )
  _, values = losses.total_loss(terms, out | {'aux': {'msw': told}}, batch)
  np.testing.assert_allclose(values['ratio'], 0.125, rtol=1e-6)
  np.testing.assert_allclose(values['mass'], 0.3, rtol=1e-6)


@pytest.mark.parametrize('name', READS)
def test_a_term_of_weight_zero_is_left_out(out, batch, name):
  terms = losses.nexus_losses(losses.proxy_anchor, **{name: 0.0})
  names = [term.name for term in terms]
  assert [x for x in names if x in READS] == [x for x in READS if x != name]
  # What it would read need not be there.
  told = {k: v for k, v in out['aux']['msw'].items() if k not in READS[name]}
  out = out | {'aux': {'msw': told}}
  assert np.isfinite(losses.total_loss(terms, out, batch)[0])


@pytest.mark.parametrize('name', READS)
def test_a_negative_weight_is_named(name):
  with pytest.raises(ValueError, match=f'{name}=-1'):
    losses.nexus_losses(losses.proxy_anchor, **{name: -1.0})


@pytest.mark.parametrize('name', NAMES)
def test_what_the_windows_do_not_tell_is_named(out, batch, name):
  terms = losses.nexus_losses(losses.proxy_anchor)
  told = {k: v for k, v in out['aux']['msw'].items() if k != name}
  with pytest.raises(ValueError, match=f'tells no {name} of its windows'):
    losses.total_loss(terms, out | {'aux': {'msw': told}}, batch)
  with pytest.raises(ValueError, match='of its windows: build it with sparse'):
    losses.total_loss(terms, out | {'aux': {}}, batch)


def test_what_is_not_one_number_per_image_is_named(out, batch):
  told = out['aux']['msw'] | {'kept': jnp.zeros((6, 2))}
  terms = losses.nexus_losses(losses.proxy_anchor)
  with pytest.raises(ValueError, match='kept of the windows must end in one'):
    losses.total_loss(terms, out | {'aux': {'msw': told}}, batch)


def test_what_a_row_that_keeps_nothing_costs_is_documented():
  np.testing.assert_allclose(-np.log(sparsity.LEAST), 13.8, atol=0.05)
