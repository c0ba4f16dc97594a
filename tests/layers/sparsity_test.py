"""Tests of `msba_jax.layers.sparsity` against float64 NumPy."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from msba_jax.layers import sparsity
from msba_jax.layers.attention import attend, attention_weights
from msba_jax.layers.block_choice import block_mask
from msba_jax.layers.sparse import attend_blocks


def draw(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def statistics_of(row):
  """Entropy over log m, maximum and deviation of the valid logits, float64."""
  if not len(row):
    return [0, 0, 0]
  p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
  entropy = -np.sum(p[p > 0] * np.log(p[p > 0]))
  return [entropy / np.log(max(len(row), 2)), row.max(), row.std()]


def kept_of(row, keep, own=-1, allowed=None):
  """Indices that stay, best first: by score, then by place."""
  allowed = np.ones(len(row), bool) if allowed is None else allowed
  order = [own] * int(own >= 0) + list(np.argsort(-row, kind='stable'))
  order = [j for j in dict.fromkeys(order) if allowed[j] and row[j] > -np.inf]
  return order[: max(keep, 0)]


def soft_of(row, keep, temperature):
  """The smooth mask of a row, float64."""
  best = -np.sort(-row)
  best = np.r_[best[0] + 2 * temperature, best, best[-1] - 2 * temperature]
  level = np.interp(keep + 0.5, np.arange(len(best)), best)
  return 1 / (1 + np.exp((level - row) / temperature))


@hypothesis.given(
  shape=st.sampled_from([(1, 1), (3, 6), (2, 2, 5)]),
  scale=st.sampled_from([0.0, 1.0, 50.0, 1e30]),
  masked=st.booleans(),
  seed=st.integers(0, 99),
)
def test_statistics_equal_the_reference(shape, scale, masked, seed):
  rng = np.random.default_rng(seed)
  logits = jnp.asarray(scale * rng.normal(size=shape) + 0.1, jnp.float32)
  mask = rng.random(shape) < (0.5 if masked else 2)
  found = sparsity.row_statistics(logits, mask=jnp.asarray(mask))
  rows, masks = (np.asarray(x).reshape(-1, shape[-1]) for x in (logits, mask))
  expected = [
    statistics_of(row[keep].astype(np.float64))
    for row, keep in zip(rows, masks, strict=True)
  ]
  np.testing.assert_allclose(
    found.reshape(-1, 3), expected, rtol=1e-5, atol=1e-6
  )


def test_equal_logits_and_masked_rows_have_finite_gradients(rng):
  logits = jnp.stack([jnp.full(5, 0.1), jnp.full(5, -jnp.inf), draw(rng, 5)])
  mask = jnp.array([[True], [True], [False]])
  total = jax.jit(
    jax.value_and_grad(
      lambda x: jnp.sum(
        sparsity.row_statistics(x, mask=mask) * jnp.array([[1.0, 2.0, 3.0]])
      )
    )
  )
  value, gradient = total(logits)
  np.testing.assert_allclose(value, 1 + 2 * 0.1, rtol=1e-6)
  np.testing.assert_allclose(gradient[0], 2 / 5, atol=1e-6)
  np.testing.assert_array_equal(gradient[1:], 0)


def test_gradients_of_statistics_equal_finite_differences(rng):
  logits = draw(rng, 2, 5)
  mask = jnp.asarray([[True] * 5, [True, False, True, False, True]])
  statistics = jax.jit(functools.partial(sparsity.row_statistics, mask=mask))
  check_grads(statistics, (logits,), 1, ['rev'], rtol=2e-2, atol=2e-2)
  gradient = jax.grad(lambda x: jnp.sum(statistics(x) ** 2))(logits)
  np.testing.assert_array_equal(np.asarray(gradient) != 0, mask)


def test_statistics_do_not_see_the_order_of_keys(rng):
  logits, order = draw(rng, 2, 7), rng.permutation(7)
  np.testing.assert_allclose(
    sparsity.row_statistics(logits),
    sparsity.row_statistics(logits[:, order]),
    rtol=1e-6,
  )


def test_counts_are_rounded_up_but_not_by_rounding():
  count, wholes = np.meshgrid(np.arange(1, 200), np.arange(1, 200))
  count, wholes = (x[wholes <= count] for x in (count, wholes))
  for dtype, most in ((jnp.float32, 200), (jnp.bfloat16, 60)):
    whole, of = (jnp.asarray(x[count < most]) for x in (wholes, count))
    ratios = jnp.asarray(whole / of, dtype)
    np.testing.assert_array_equal(sparsity.keep_counts(ratios, of), whole)
  found = sparsity.keep_counts(
    jnp.array([[0.0, 0.125, 0.3, 1.0, 1.5]]), jnp.array([[9], [0]])
  )
  chex.assert_type(found, jnp.int32)
  assert found.tolist() == [[1, 2, 3, 9, 9], [1, 1, 1, 1, 1]]
  assert sparsity.keep_counts(0.25, 8) == 2


chosen = jax.jit(sparsity.topk_mask)


@jax.jit
def mask_and_indices(scores, keep, own, mask):
  return (
    sparsity.topk_mask(scores, keep, own=own, mask=mask),
    sparsity.topk_indices(scores, keep, own=own, mask=mask),
  )


@hypothesis.given(
  shape=st.sampled_from([(1, 1), (3, 7), (2, 4, 5)]),
  masked=st.booleans(),
  seed=st.integers(0, 99),
)
@hypothesis.settings(max_examples=30)
def test_the_largest_are_kept(shape, masked, seed):
  rng = np.random.default_rng(seed)
  m = shape[-1]
  # Few values: ties, among them zeros of both signs; and no candidates.
  values = [-np.inf, -2.0, -0.0, 0.0, 1e-3, 3.0]
  scores = rng.choice(values, shape).astype(np.float32)
  keep = rng.integers(1, m + 1, shape[:-1])
  own = rng.integers(-1, m, shape[-2])
  mask = rng.random(shape) < (0.6 if masked else 2)
  found, indices = mask_and_indices(
    *map(jnp.asarray, (scores, keep, own, mask))
  )
  chex.assert_type(indices, jnp.int32)
  chex.assert_shape(indices, shape)
  np.testing.assert_array_equal(block_mask(indices, m), found)
  for place in np.ndindex(shape[:-1]):
    expected = kept_of(scores[place], keep[place], own[place[-1]], mask[place])
    assert np.flatnonzero(found[place]).tolist() == sorted(expected)
    assert indices[place].tolist() == expected + [-1] * (m - len(expected))


def test_a_number_to_keep_is_an_array_of_it(rng, variant):
  scores = draw(rng, 2, 3, 6)
  mask = variant(lambda x: sparsity.topk_mask(x, 4))(scores)
  indices = variant(lambda x: sparsity.topk_indices(x, 4))(scores)
  expected = mask_and_indices(
    scores, jnp.array(4), jnp.full(3, -1), jnp.ones((2, 3, 6), bool)
  )
  np.testing.assert_array_equal(mask, expected[0])
  np.testing.assert_array_equal(indices, expected[1][..., :4])


def test_real_scores_of_all_sizes_are_ordered(rng):
  scores = rng.normal(size=(4, 50)) * 10.0 ** rng.integers(-30, 30, (4, 50))
  scores = scores.astype(np.float32)
  scores[0, 7], scores[1, 8] = np.finfo(np.float32).max, np.nan
  keep = np.array([1, 9, 26, 49])
  found = chosen(jnp.asarray(scores), jnp.asarray(keep))
  for row, count, kept in zip(scores, keep, found, strict=True):
    expected = kept_of(row, count)
    assert np.flatnonzero(kept).tolist() == sorted(expected)


def test_an_own_key_that_is_masked_is_not_kept(rng):
  scores = draw(rng, 2, 4)
  mask = jnp.array([[True, False, True, True], [False] * 4])
  own = jnp.array([1, 0])
  found = chosen(scores, jnp.array(2), own=own, mask=mask)
  assert found.sum(axis=-1).tolist() == [2, 0]
  assert not found[0, 1]
  relative = sparsity.relative_mask(
    jax.nn.softmax(scores), 0.0, own=own, mask=mask
  )
  np.testing.assert_array_equal(relative, mask)


def test_a_count_of_zero_keeps_nothing_but_is_no_number(rng):
  scores = draw(rng, 2, 4)
  found = chosen(scores, jnp.array([0, 3]), own=jnp.array([1, 1]))
  assert found.sum(axis=-1).tolist() == [0, 3]


def test_permuting_keys_permutes_the_choice(rng):
  scores, keep = draw(rng, 3, 9), jnp.array([2, 5, 7])
  order = rng.permutation(9)
  place = jnp.asarray(np.argsort(order))
  own = jnp.array([4, 0, 8])
  temperature = 0.3
  np.testing.assert_array_equal(
    chosen(scores[:, order], keep, own=place[own]),
    chosen(scores, keep, own=own)[:, order],
  )
  np.testing.assert_allclose(
    smooth(scores[:, order], 2.3, temperature, own=place[own]),
    smooth(scores, 2.3, temperature, own=own)[:, order],
    rtol=1e-6,
  )


def test_one_compilation_for_all_counts(rng):
  traces = []

  @jax.jit
  def both(scores, keep):
    traces.append(keep)
    return (
      sparsity.topk_mask(scores, keep),
      sparsity.topk_indices(scores, keep, most=3),
    )

  scores = draw(rng, 4, 6)
  for keep in ([1, 2, 3, 1], [6, 4, 3, 5]):
    mask, indices = both(scores, jnp.array(keep))
    assert mask.sum(axis=-1).tolist() == keep
    # A row has no more room than that.
    room = [min(x, 3) for x in keep]
    assert (indices >= 0).sum(axis=-1).tolist() == room
  assert len(traces) == 1


def test_it_runs_where_rows_lie_on_several_devices(rng):
  scores = draw(rng, 8, 6)
  mesh = jax.make_mesh(
    (4,), ('data',), devices=jax.devices()[:4], axis_types=(AxisType.Auto,)
  )
  found = jax.jit(
    jax.shard_map(
      lambda x: sparsity.topk_mask(x, 2) * sparsity.soft_keep(x, 2.0, 1.0),
      mesh=mesh,
      in_specs=PartitionSpec('data'),
      out_specs=PartitionSpec('data'),
    )
  )(scores)
  expected = chosen(scores, jnp.array(2)) * smooth(scores, 2.0, 1.0)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('own', [None, [3, 0]])
def test_relative_weights(rng, own):
  weights = rng.dirichlet([0.5] * 5, (3, 2)).astype(np.float32)
  weights[0, 0] = 0
  thresholds = rng.random((3, 2)).astype(np.float32)
  mask = rng.random((3, 2, 5)) < 0.7
  found = sparsity.relative_mask(
    jnp.asarray(weights),
    jnp.asarray(thresholds),
    own=None if own is None else jnp.array(own),
    mask=jnp.asarray(mask),
  )
  expected = np.zeros_like(mask)
  for b, n, j in np.ndindex(weights.shape):
    row = weights[b, n][mask[b, n]]
    large = row.size and weights[b, n, j] >= thresholds[b, n] * row.max()
    expected[b, n, j] = large and weights[b, n, j] > 0
    expected[b, n, j] |= own is not None and j == own[n]
    expected[b, n, j] &= mask[b, n, j]
  np.testing.assert_array_equal(found, expected)


smooth = jax.jit(sparsity.soft_keep)


@hypothesis.given(
  shape=st.sampled_from([(1, 1), (2, 6), (2, 2, 3)]),
  temperature=st.sampled_from([0.05, 1.0, 7.0]),
  seed=st.integers(0, 99),
)
def test_the_smooth_mask_equals_the_reference(shape, temperature, seed):
  rng = np.random.default_rng(seed)
  scores = draw(rng, *shape)
  keep = rng.uniform(0, shape[-1], shape[:-1])
  found = smooth(scores, jnp.asarray(keep, jnp.float32), temperature)
  expected = [
    soft_of(row, count, temperature)
    for row, count in zip(
      np.asarray(scores, np.float64).reshape(-1, shape[-1]),
      keep.reshape(-1),
      strict=True,
    )
  ]
  np.testing.assert_allclose(
    found.reshape(-1, shape[-1]), expected, rtol=1e-3, atol=2e-5
  )


def test_for_a_whole_number_the_largest_lie_above_one_half(rng):
  scores, own = draw(rng, 5, 7), jnp.array([0, 3, 6, 2, 1])
  mask = jnp.asarray(rng.random((5, 7)) < 0.7).at[jnp.arange(5), own].set(True)
  nobody, all_of_it = jnp.full(5, -1), jnp.ones((5, 7), bool)
  for keep in (1, 2, 4, 7):
    for own_, mask_ in ((nobody, all_of_it), (own, mask)):
      soft = smooth(scores, float(keep), 0.2, own=own_, mask=mask_)
      hard = mask_and_indices(scores, jnp.array(keep), own_, mask_)[0]
      np.testing.assert_array_equal(soft > 0.5, hard)
  np.testing.assert_array_equal(soft[jnp.arange(5), own], 1)
  np.testing.assert_array_equal(np.asarray(soft)[~np.asarray(mask)], 0)


def test_the_smooth_mask_learns_from_scores_and_count(rng):
  scores = draw(rng, 3, 6)
  # Away from the kinks at the ranks.
  keep = jnp.array([1.2, 3.7, 5.9])
  soft = functools.partial(smooth, temperature=0.7)
  check_grads(soft, (scores, keep), 1, ['rev'], rtol=2e-2, atol=2e-2)
  to_keep = jax.grad(lambda k: jnp.sum(soft(scores, k)))(keep)
  assert np.all(np.asarray(to_keep) > 0.1)
  # All of them in the same direction change nothing.
  to_scores = jax.grad(lambda s: jnp.sum(soft(s, keep) ** 2))(scores)
  np.testing.assert_allclose(to_scores.sum(axis=-1), 0, atol=1e-6)
  assert np.all(np.asarray(to_scores) != 0)


def test_one_more_to_keep_is_one_more_kept():
  scores = jnp.linspace(0, 50, 501)[None]
  to_keep = jax.grad(lambda k: jnp.sum(smooth(scores, k, 1.0)))
  np.testing.assert_allclose(to_keep(250.0), 1, rtol=1e-3)


def test_masked_scores_have_no_gradient(rng):
  scores = draw(rng, 4, 5).at[3].set(-jnp.inf)
  mask = jnp.array([[0, 1, 1, 0, 1], [1, 1, 0, 1, 1], [0] * 5, [1] * 5]) > 0
  own = jnp.array([0, 1, 2, 3])

  @jax.jit
  def gradients(scores, keep):
    return jax.grad(
      lambda s, k: jnp.sum(
        sparsity.soft_keep(s, k, 0.5, own=own, mask=mask) ** 2
      ),
      (0, 1),
    )(scores, keep)

  keep = jnp.array([1.5, 2.5, 1.5, 2.5])
  to_scores, to_keep = gradients(scores, keep)
  chex.assert_tree_all_finite((to_scores, to_keep))
  np.testing.assert_array_equal(np.asarray(to_scores)[~np.asarray(mask)], 0)
  np.testing.assert_array_equal(to_scores[2:], 0)
  np.testing.assert_array_equal(to_keep[2:], 0)
  assert np.any(np.asarray(to_scores[:2]) != 0, axis=-1).all()
  other = jnp.where(mask, scores, 9.0)
  chex.assert_trees_all_equal(gradients(other, keep)[1], to_keep)


def test_sparse_weights_are_the_softmax_of_what_is_kept(rng):
  given = [draw(rng, 2, 6, 2, 4) for _ in range(3)]
  weights = attention_weights(*given[:2])
  kept = chosen(weights, jnp.array(3))
  found = sparsity.sparse_weights(weights, kept)
  expected = attention_weights(*given[:2], mask=kept)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  # Masks that are numbers, one for all heads.
  shared = jnp.asarray(rng.random((2, 1, 6, 6)), jnp.float32)
  product = np.asarray(weights, np.float64) * np.asarray(shared)
  np.testing.assert_allclose(
    sparsity.sparse_weights(weights, shared),
    product / product.sum(axis=-1, keepdims=True),
    rtol=1e-5,
  )


def test_kept_weights_of_next_to_nothing(rng):
  weights = jnp.array([[0.7, 0.3, 0.0], [1 - 1e-5, 1e-5, 0.0]])
  kept = jnp.array([[False, False, True], [False, True, False]])
  found = sparsity.sparse_weights(weights, kept)
  np.testing.assert_allclose(found, [[0, 0, 0], [0, 1, 0]], rtol=1e-6)
  weight = draw(rng, 2, 3)
  gradients = jax.grad(
    lambda w, k: jnp.sum(weight * sparsity.sparse_weights(w, k)), (0, 1)
  )(weights, kept.astype(jnp.float32))
  chex.assert_tree_all_finite(gradients)
  # A key that is not kept has no say.
  np.testing.assert_array_equal(gradients[0][~kept], 0)


def test_the_mask_and_the_indices_give_the_same_attention(rng):
  given = [draw(rng, 8, 2, 4) for _ in range(3)]
  scores = draw(rng, 2, 4, 4)
  keep = jnp.array([[1, 2, 3, 4], [2, 2, 1, 3]])
  own = jnp.arange(4)
  mask, indices = mask_and_indices(scores, keep, own, jnp.ones((2, 4, 4), bool))
  mask = jnp.repeat(jnp.repeat(mask, 2, axis=-1), 2, axis=-2)
  np.testing.assert_allclose(
    attend_blocks(*given, indices, block=2),
    attend(*given, mask=mask),
    atol=2e-6,
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_results_have_the_dtype_of_the_scores(rng, dtype):
  scores = draw(rng, 3, 6).astype(dtype)
  same = scores.astype(jnp.float32)
  kept = chosen(scores, jnp.array(3))
  np.testing.assert_array_equal(kept, chosen(same, jnp.array(3)))
  for function in (
    sparsity.row_statistics,
    functools.partial(smooth, keep=2.0, temperature=0.5),
    lambda x: sparsity.sparse_weights(jax.nn.softmax(x), kept),
  ):
    chex.assert_type(function(scores), dtype)
    np.testing.assert_allclose(
      np.asarray(function(scores), np.float32), function(same), atol=2e-2
    )


def test_compiled_equals_eager(rng, variant):
  scores = draw(rng, 2, 3, 5)

  def all_of_it(scores, ratios):
    keep = sparsity.keep_counts(ratios, 5)
    kept = sparsity.topk_mask(scores, keep, own=jnp.arange(3))
    return keep, kept, sparsity.row_statistics(scores)

  ratios = jnp.array([[0.2, 0.4, 0.6], [1.0, 0.3, 0.5]])
  keep, kept, statistics = variant(all_of_it)(scores, ratios)
  assert keep.tolist() == [[1, 2, 3], [5, 2, 3]]
  np.testing.assert_array_equal(kept.sum(axis=-1), keep)
  assert kept[:, jnp.arange(3), jnp.arange(3)].all()
  chex.assert_shape(statistics, (2, 3, 3))


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize('select', [sparsity.topk_mask, sparsity.topk_indices])
def test_misuse_of_a_choice_is_named(select):
  scores = jnp.zeros((2, 4))
  for keep in (0, 5):
    with pytest.raises(ValueError, match=f'{keep} must be between 1 and the 4'):
      select(scores, keep)
  with pytest.raises(TypeError, match=r'keep\.dtype=.*float32'):
    select(scores, jnp.array([1.0, 2.0]))
  with pytest.raises(ValueError, match=r'own\.shape=\(3,\)'):
    select(scores, 1, own=jnp.arange(3))
  with pytest.raises(TypeError, match=r'own\.dtype=.*float32'):
    select(scores, 1, own=jnp.zeros(2))
  with pytest.raises(TypeError, match=r'mask\.dtype=.*int32'):
    select(scores, 1, mask=jnp.zeros((2, 4), jnp.int32))


def test_room_for_too_few_is_named():
  scores = jnp.zeros((2, 4))
  with pytest.raises(ValueError, match='keep=3 must not be more than most=2'):
    sparsity.topk_indices(scores, 3, most=2)
  with pytest.raises(ValueError, match='most=5 must be between 1 and the 4'):
    sparsity.topk_indices(scores, jnp.array([1, 2]), most=5)


@pytest.mark.parametrize('temperature', [0.0, -1.0, float('nan')])
def test_a_temperature_that_is_not_positive_is_named(temperature):
  with pytest.raises(ValueError, match='temperature='):
    sparsity.soft_keep(jnp.zeros((2, 4)), 1.0, temperature)
