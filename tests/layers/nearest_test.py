"""Tests of `msba_jax.layers.nearest` and of its reservoir."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.layers.nearest import (
  CHUNK,
  MAX_STREAM,
  MIN_STREAM,
  exact_topk,
  inner_products,
)
from msba_jax.layers.reservoir import MAX_TILE, drain, pour, reservoir


def reference(queries, gallery, k, valid=None, exclude=None):
  """Sorts everything in float64: score downwards, then index upwards."""
  scores = np.asarray(queries, np.float64) @ np.asarray(gallery, np.float64).T
  return sort(scores, k, valid, exclude)


def sort(scores, k, valid=None, exclude=None):
  """The first k of a stable sort of the scores that may answer."""
  scores = np.where(np.isnan(scores), -np.inf, np.asarray(scores, np.float64))
  if valid is not None:
    scores[:, ~np.asarray(valid)] = -np.inf
  if exclude is not None:
    for row, column in enumerate(np.asarray(exclude)):
      if column >= 0:
        scores[row, column] = -np.inf
  scores = np.pad(scores, ((0, 0), (0, k)), constant_values=-np.inf)
  indices = np.argsort(-scores, axis=1, kind='stable')[:, :k]
  scores = np.take_along_axis(scores, indices, axis=1)
  return scores, np.where(scores > -np.inf, indices, -1)


def integers(rng, count, d=2):
  """Vectors whose products are exact, so that ties are many and certain."""
  return jnp.asarray(rng.integers(-2, 3, (count, d)), jnp.float32)


@hypothesis.settings(max_examples=10)
@hypothesis.given(
  n=st.sampled_from([2, 128, 129, 300]), k=st.sampled_from([3, 140]),
  block=st.sampled_from([1, 130, 1000]), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_a_stable_sort_with_ties(n, k, block, seed):
  rng = np.random.default_rng(seed)
  queries, gallery = integers(rng, 4), integers(rng, n)
  valid = jnp.asarray(rng.random(n) < 0.8)
  exclude = jnp.asarray(rng.integers(-1, n, 4), jnp.int32)
  found = exact_topk(
    queries, gallery, k, valid=valid, exclude=exclude, block=block
  )
  scores, indices = reference(queries, gallery, k, valid, exclude)
  np.testing.assert_array_equal(found.scores, scores)
  np.testing.assert_array_equal(found.indices, indices)


@hypothesis.settings(max_examples=6)
@hypothesis.given(
  q=st.sampled_from([MIN_STREAM, CHUNK + 3]),
  n=st.sampled_from([31, 1024, 2100]), k=st.sampled_from([1, 33, MAX_STREAM]),
  block=st.sampled_from([128, 4096]), seed=st.integers(0, 99),
)  # fmt: skip
def test_many_queries_equal_a_stable_sort_with_ties(q, n, k, block, seed):
  rng = np.random.default_rng(seed)
  queries, gallery = integers(rng, q, 4), integers(rng, n, 4)
  valid = jnp.asarray(rng.random(n) < 0.8)
  exclude = jnp.asarray(rng.integers(-1, n, q), jnp.int32)
  found = exact_topk(
    queries, gallery, k, valid=valid, exclude=exclude, block=block
  )
  scores, indices = reference(queries, gallery, k, valid, exclude)
  np.testing.assert_array_equal(found.scores, scores)
  np.testing.assert_array_equal(found.indices, indices)


@functools.partial(jax.jit, static_argnames='k')
def poured(scores, allowed, exclude, *, k):
  """The k best of tiles (t, m, q) in turn."""
  best = reservoir(k, scores.shape[2])
  for i, tile in enumerate(scores):
    best = pour(
      best,
      tile,
      jnp.int32(i * len(tile)),
      k=k,
      allowed=allowed[i],
      exclude=exclude,
    )
  return drain(best, k)


# Every row is one way in which the scores of a query can come.
ARRIVALS = {
  'at random': lambda rng, n: rng.normal(size=n),
  'with ties': lambda rng, n: rng.integers(-3, 4, n),
  'rising': lambda rng, n: np.sort(rng.normal(size=n)),
  'falling': lambda rng, n: -np.sort(rng.normal(size=n)),
  'equal': lambda rng, n: np.full(n, rng.normal()),
  'without numbers': lambda rng, n: np.full(n, np.nan),
  'extreme': lambda rng, n: rng.choice(
    [np.nan, np.inf, -np.inf, 0.0, -0.0, 2e-38, -2e-38, 3e38, -1.0], n
  ),
  'at borders': lambda rng, n: np.where(
    np.isin(np.arange(n) % 32, [0, 31]), rng.integers(0, 2, n), -1
  ),
}


@hypothesis.settings(max_examples=25)
@hypothesis.given(
  k=st.sampled_from([1, 7, 40]), share=st.sampled_from([0.0, 0.02, 1.0]),
  excluded=st.sampled_from([-1, 0, 31, 32, 319, 320, 600]),
  seed=st.integers(0, 999),
)  # fmt: skip
def test_what_is_poured_equals_a_stable_sort(k, share, excluded, seed):
  rng = np.random.default_rng(seed)
  tiles, size = 4, 320
  scores = np.float32([x(rng, tiles * size) for x in ARRIVALS.values()])
  valid = rng.random(tiles * size) < share
  exclude = np.full(len(scores), excluded, np.int32)
  found = poured(
    jnp.asarray(scores.T.reshape(tiles, size, -1)),
    jnp.asarray(valid.reshape(tiles, size)),
    jnp.asarray(exclude),
    k=k,
  )
  expected = sort(scores, k, valid, exclude)
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize('above', [0, 1, 255, 256, 257, MAX_TILE])
def test_a_full_reservoir_is_sorted_out(rng, above):
  # Every tile lets as many pass, around what the reservoir has room for.
  scores = np.zeros((5, MAX_TILE, 2), np.float32)
  for i, tile in enumerate(scores):
    chosen = rng.choice(MAX_TILE, above, replace=False)
    tile[chosen, 1] = i + rng.random(above)
  found = poured(
    jnp.asarray(scores),
    jnp.ones((5, MAX_TILE), bool),
    jnp.full(2, -1, jnp.int32),
    k=3,
  )
  expected = sort(scores.reshape(-1, 2).T, 3)
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_array_equal(found[1], expected[1])


def test_real_numbers_eager_and_compiled(variant, rng):
  queries = jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)
  gallery = jnp.asarray(rng.normal(size=(400, 16)), jnp.float32)
  found = variant(exact_topk, static_argnums=2)(queries, gallery, 7)
  scores, indices = reference(queries, gallery, 7)
  np.testing.assert_allclose(found.scores, scores, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found.indices, indices)
  chex.assert_type(found.scores, jnp.float32)
  chex.assert_type(found.indices, jnp.int32)


@pytest.mark.parametrize('count', [3, MIN_STREAM])
def test_the_block_changes_no_bit(rng, count):
  queries = jnp.asarray(rng.normal(size=(count, 50)), jnp.float32)
  gallery = jnp.asarray(rng.normal(size=(700, 50)), jnp.float32)
  whole = exact_topk(queries, gallery, 20)
  for block in (128, 384):
    chex.assert_trees_all_equal(
      exact_topk(queries, gallery, 20, block=block), whole
    )


def test_copies_tie_wherever_they_stand(rng):
  gallery = np.repeat(rng.normal(size=(1, 37)), 515, axis=0)
  gallery = jnp.asarray(gallery, jnp.float32)
  found = exact_topk(gallery[:1], gallery, 515, block=128)
  np.testing.assert_array_equal(found.indices[0], np.arange(515))


def test_copies_tie_for_many_queries(rng):
  queries = jnp.asarray(rng.normal(size=(CHUNK + 90, 37)), jnp.float32)
  vectors = np.repeat(rng.normal(size=(3, 37)), 1111, axis=0)
  found = exact_topk(queries, jnp.asarray(vectors, jnp.float32), 200)
  first = np.asarray(found.indices)[:, :1]
  assert set(first.ravel()) <= {0, 1111, 2222}
  np.testing.assert_array_equal(found.indices, first + np.arange(200))


def test_negative_zero_ties_with_zero():
  gallery = jnp.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
  found = exact_topk(jnp.array([[0.0, -0.0]]), gallery, 3)
  np.testing.assert_array_equal(found.indices, [[0, 1, 2]])


def test_a_permuted_gallery_gives_the_same_images(rng):
  queries = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
  gallery = jnp.asarray(rng.normal(size=(200, 8)), jnp.float32)
  order = rng.permutation(200)
  whole = exact_topk(queries, gallery, 9, block=128)
  permuted = exact_topk(queries, gallery[order], 9, block=128)
  np.testing.assert_array_equal(permuted.scores, whole.scores)
  np.testing.assert_array_equal(order[permuted.indices], whole.indices)


def test_nobody_answers():
  queries = jnp.ones((2, 3))
  nobody = exact_topk(queries, queries, 2, valid=jnp.zeros(2, bool))
  alone = exact_topk(queries[:1], queries[:1], 2, exclude=jnp.zeros(1, int))
  empty = exact_topk(queries, queries[:0], 2)
  for found in (nobody, alone, empty):
    assert np.all(np.asarray(found.scores) == -np.inf)
    assert np.all(np.asarray(found.indices) == -1)
  assert exact_topk(queries[:0], queries, 2).indices.shape == (0, 2)


@pytest.mark.parametrize('count', [1, MIN_STREAM])
def test_nan_never_answers(count):
  gallery = jnp.array([[jnp.nan, 0.0], [1.0, 0.0], [-jnp.inf, 0.0]])
  queries = jnp.tile(jnp.array([[1.0, 0.0]]), (count, 1))
  found = exact_topk(queries, gallery, 3)
  np.testing.assert_array_equal(found.indices, [[1, -1, -1]] * count)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_half_precision_scores_are_float32(rng, dtype):
  queries = jnp.asarray(rng.normal(size=(2, 8)), dtype)
  gallery = jnp.asarray(rng.normal(size=(9, 8)), dtype)
  found = exact_topk(queries, gallery, 9)
  chex.assert_type(found.scores, jnp.float32)
  np.testing.assert_allclose(
    found.scores, reference(queries, gallery, 9)[0], rtol=1e-5, atol=1e-5
  )


def test_sharded_queries_find_the_same(rng):
  queries = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
  gallery = jnp.asarray(rng.normal(size=(50, 8)), jnp.float32)
  mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  whole = exact_topk(queries, gallery, 3)
  sharded = exact_topk(jax.device_put(queries, rows), gallery, 3)
  np.testing.assert_array_equal(sharded.indices, whole.indices)
  np.testing.assert_allclose(sharded.scores, whole.scores, rtol=1e-6)


@pytest.mark.parametrize('count', [3, MIN_STREAM])
def test_every_device_searches_its_share_of_the_gallery(rng, count):
  queries = jnp.asarray(rng.normal(size=(count, 8)), jnp.float32)
  gallery = jnp.asarray(rng.normal(size=(40, 8)), jnp.float32)
  mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))
  split, whole = (jax.sharding.PartitionSpec(x) for x in ('data', None))
  search = jax.shard_map(
    lambda queries, gallery: exact_topk(queries, gallery, 2).scores[None],
    mesh=mesh,
    in_specs=(whole, split),
    out_specs=split,
  )
  shares = np.split(np.asarray(gallery), 8)
  expected = [reference(queries, share, 2)[0] for share in shares]
  np.testing.assert_allclose(
    jax.jit(search)(queries, gallery), expected, rtol=1e-5, atol=1e-6
  )


def test_every_device_answers_its_share_of_the_queries(rng):
  queries = jnp.asarray(rng.normal(size=(8 * MIN_STREAM, 8)), jnp.float32)
  gallery = jnp.asarray(rng.normal(size=(40, 8)), jnp.float32)
  mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))
  split, whole = (jax.sharding.PartitionSpec(x) for x in ('data', None))
  search = jax.shard_map(
    lambda queries, gallery: exact_topk(queries, gallery, 2).indices,
    mesh=mesh,
    in_specs=(split, whole),
    out_specs=split,
  )
  np.testing.assert_array_equal(
    jax.jit(search)(queries, gallery), reference(queries, gallery, 2)[1]
  )


def test_memory_is_a_block_and_not_the_product():
  def largest(closed):
    sizes = [0]
    for equation in closed.eqns:
      sizes += [variable.aval.size for variable in equation.outvars]
      for value in equation.params.values():
        for part in value if isinstance(value, tuple) else (value,):
          nested = getattr(part, 'jaxpr', None)
          if nested is not None:
            sizes.append(largest(nested))
    return max(sizes)

  queries, gallery = jnp.zeros((64, 2)), jnp.zeros((12_800, 2))
  closed = jax.make_jaxpr(lambda a, b: exact_topk(a, b, 3, block=128))
  assert largest(closed(queries, gallery).jaxpr) <= 12_800 * 2


def test_inner_products_add_up_in_float32(rng):
  vectors = jnp.asarray(rng.normal(size=(6, 300)), jnp.bfloat16)
  exact = np.asarray(vectors, np.float64)
  products = inner_products(vectors, vectors)
  np.testing.assert_allclose(products, exact @ exact.T, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize(
  ('options', 'error', 'message'),
  [
    ({'k': 0}, ValueError, 'k=0'),
    ({'block': 0}, ValueError, 'block=0'),
    ({'valid': jnp.ones(3, bool)}, ValueError, r'\(3,\)'),
    ({'exclude': jnp.ones(3, int)}, ValueError, r'\(3,\)'),
    ({'gallery': jnp.ones((4, 5))}, ValueError, r'\(4, 5\)'),
    ({'valid': jnp.ones(4, int)}, TypeError, 'Boolean'),
    ({'exclude': jnp.ones(2)}, TypeError, 'integer'),
  ],
)
def test_what_does_not_fit_is_named(options, error, message):
  arguments = {'queries': jnp.ones((2, 3)), 'gallery': jnp.ones((4, 3)), 'k': 1}
  with pytest.raises(error, match=message):
    exact_topk(**(arguments | options))
