"""Tests of `msba_jax.layers.chunked`; values: see attention_test."""

import functools
import math

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.layers import attention, chunked
from msba_jax.layers.chunked_gradients import chunked_gradients
from msba_jax.layers.chunks import plan_chunks

SIZES = st.sampled_from([1, 2, 5, 9])


def draw(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def arrays(rng, n, m, h=2, d=4, f=3, lead=()):
  """Queries, keys and values."""
  return (
    draw(rng, *lead, n, h, d),
    draw(rng, *lead, m, h, d),
    draw(rng, *lead, m, h, f),
  )


def agree(ours, theirs, given, tolerance=2e-5):
  """Both functions have the same value and the same gradients."""
  values = [
    jax.jit(jax.value_and_grad(function, range(len(given))))(*given)
    for function in (ours, theirs)
  ]
  for a, b in zip(*map(jax.tree.leaves, values), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@hypothesis.given(
  n=SIZES, m=SIZES, rows=st.integers(1, 9), columns=st.integers(1, 9),
  bias=st.sampled_from(
    [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0, 1), (2, 1, 1), (3, 1, 2, 1, 1)]
  ),
  mask=st.sampled_from([(0, 0), (1, 0), (0, 1), (3, 1, 1, 0, 1), (2, 1, 1)]),
  seed=st.integers(0, 99),
)  # fmt: skip
def test_every_chunk_and_broadcast_has_the_gradients_of_dense(
  n, m, rows, columns, bias, mask, seed
):
  rng = np.random.default_rng(seed)
  given = arrays(rng, n, m, lead=(3, 1))
  # The last two entries say whether the axis is there; the first are sizes.
  shape = (*bias[:-2], n if bias[-2] else 1, m if bias[-1] else 1)
  bias = draw(rng, *shape)
  shape = (*mask[:-2], n if mask[-2] else 1, m if mask[-1] else 1)
  mask = jnp.asarray(rng.random(shape) < 0.7)
  weights = draw(rng, 3, 1, n, 2, 3)

  def total(queries, keys, values, bias, **options):
    messages = attention.attend(
      queries, keys, values, mask=mask, bias=bias, **options
    )
    return jnp.sum(messages * weights)

  agree(
    functools.partial(total, chunk=(rows, columns)),
    functools.partial(total, implementation='dense'),
    (*given, bias),
  )


@pytest.mark.parametrize('together', [False, True])
@pytest.mark.parametrize('bias_of', [(0, 0, 0), (2, 0, 1)])
def test_heads_together_or_one_by_one(monkeypatch, rng, together, bias_of):
  platform = 'gpu' if together else 'cpu'
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  queries, keys, values = (
    draw(rng, 3, 5, 4), draw(rng, 3, 6, 4), draw(rng, 3, 6, 2)
  )  # fmt: skip
  bias = draw(rng, max(bias_of) + 1, 5, 6)
  plan = plan_chunks(5, 6, scale=0.5, chunk=(2, 4), bias_of=bias_of)
  # Heads that share a bias cannot add to its gradient at once.
  assert plan.together == (together and bias_of == (2, 0, 1))

  def ours(queries, keys, values, bias):
    messages, lse = chunked.chunked_attention(
      plan, queries, keys, values, None, bias
    )
    return jnp.sum(messages**2) + jnp.sum(jnp.sin(lse))

  def theirs(queries, keys, values, bias):
    scores = jnp.einsum('gnd,gmd->gnm', queries, keys) * 0.5
    scores = scores + bias[jnp.array(bias_of)]
    messages = jax.nn.softmax(scores) @ values
    lse = jax.nn.logsumexp(scores, axis=-1)
    return jnp.sum(messages**2) + jnp.sum(jnp.sin(lse))

  agree(ours, theirs, (queries, keys, values, bias))


def test_normalizers_and_their_gradients(variant, rng):
  queries, keys, values = arrays(rng, 5, 7)
  mask = jnp.asarray(rng.random((5, 7)) < 0.5).at[2].set(False)
  weights = draw(rng, 5, 2)

  def ours(queries, keys):
    lse = chunked.attend_in_chunks(
      queries, keys, values, mask=mask, scale=0.5, chunk=(2, 3)
    ).normalizer
    return jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) * weights), lse

  def theirs(queries, keys):
    scores = attention.attention_scores(queries, keys, mask=mask, scale=0.5)
    lse = attention.log_normalizer(scores).T
    return jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) * weights), lse

  (ours, lse), gradients = variant(
    jax.value_and_grad(ours, (0, 1), has_aux=True)
  )(queries, keys)
  (theirs, wanted), expected = jax.value_and_grad(theirs, (0, 1), True)(
    queries, keys
  )
  np.testing.assert_allclose(lse, wanted, atol=1e-6)
  assert np.all(np.asarray(lse)[2] == -np.inf)
  chex.assert_trees_all_close((ours, gradients), (theirs, expected), atol=1e-5)


def test_gradients_of_shares_add_up_to_the_whole(rng):
  queries, keys, values = (
    draw(rng, 2, 5, 4), draw(rng, 2, 8, 4), draw(rng, 2, 8, 3)
  )  # fmt: skip
  whole = plan_chunks(5, 8, scale=0.5, chunk=(2, 3))
  half = plan_chunks(5, 4, scale=0.5, chunk=(2, 3))
  change = draw(rng, 2, 5, 3)
  attended, pull = jax.vjp(
    lambda *x: chunked.chunked_attention(whole, *x), queries, keys, values
  )
  expected = pull(chunked.Attended(change, jnp.zeros_like(attended.normalizer)))
  shift = jnp.sum(change * attended.messages, axis=-1)
  first, second = (
    chunked_gradients(
      half, queries, keys[:, share], values[:, share], None, None,
      attended.normalizer, shift, change,
    )
    for share in (slice(0, 4), slice(4, 8))
  )  # fmt: skip
  ours = (
    first[0] + second[0],
    jnp.concatenate([first[1], second[1]], axis=1),
    jnp.concatenate([first[2], second[2]], axis=1),
  )
  chex.assert_trees_all_close(ours, expected, atol=1e-5)


def test_second_derivatives_equal_those_of_dense(rng):
  queries, keys, values = arrays(rng, 3, 4, h=1, d=2, f=2)

  def bend(queries, **options):
    def total(queries):
      messages = attention.attend(queries, keys, values, **options)
      return jnp.sum(messages**3)

    return jax.jacrev(jax.grad(total))(queries)

  np.testing.assert_allclose(
    bend(queries, chunk=2), bend(queries, implementation='dense'), atol=1e-5
  )


def test_under_vmap(rng):
  given = arrays(rng, 5, 7, lead=(3,))
  messages = jax.vmap(functools.partial(attention.attend, chunk=3))(*given)
  np.testing.assert_allclose(
    messages, attention.attend(*given, implementation='dense'), atol=1e-6
  )


def test_nothing_of_the_size_of_the_scores_is_kept(rng):
  n = 1024
  queries, keys, values = arrays(rng, n, n, h=4, d=8, f=8)

  def bytes_of(**options):
    def total(*given):
      return jnp.sum(attention.attend(*given, **options) ** 2)

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(queries, keys, values)
    return compiled.compile().memory_analysis().temp_size_in_bytes

  # One chunk of scores is 64 · 256 · 4 bytes; a few stand at a time.
  assert bytes_of(chunk=(64, 256)) < 16 * queries.nbytes + 8 * 64 * 256 * 4
  assert bytes_of(implementation='dense') > 4 * n * n * 4


def test_one_trace_for_all_masks_of_a_shape(rng):
  queries, keys, values = arrays(rng, 4, 6)
  traces = []

  @jax.jit
  def messages(mask):
    traces.append(mask)
    return attention.attend(queries, keys, values, mask=mask, chunk=3)

  for _ in range(3):
    messages(jnp.asarray(rng.random((4, 6)) < 0.5))
  assert len(traces) == 1


def test_inside_shard_map_and_pmap(rng):
  queries, keys, values = arrays(rng, 4, 6, lead=(2,))
  bias = draw(rng, 4, 6)

  def total(queries, keys, values, bias):
    messages = attention.attend(queries, keys, values, bias=bias, chunk=(2, 3))
    return jnp.sum(messages**2)[None]

  def expected(queries, keys, values, bias):
    messages = attention.attend(
      queries, keys, values, bias=bias, implementation='dense'
    )
    return jnp.sum(messages**2)

  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:2],
  )  # fmt: skip
  spec = jax.sharding.PartitionSpec('data')
  none = jax.sharding.PartitionSpec()
  mapped = jax.shard_map(
    total, mesh=mesh, in_specs=(spec, spec, spec, none), out_specs=spec
  )
  agree(
    lambda *given: jnp.sum(mapped(*given)),
    expected,
    (queries, keys, values, bias),
  )
  each = jax.pmap(total, in_axes=(0, 0, 0, None), devices=jax.devices()[:2])
  np.testing.assert_allclose(
    jnp.sum(each(queries, keys, values, bias)),
    expected(queries, keys, values, bias),
    rtol=1e-5,
  )


@pytest.mark.parametrize(
  ('size', 'most', 'unit'), [(10, 4, 1), (10, 99, 1), (12, 5, 3), (9, 2, 3)]
)
def test_chunks_are_even_and_hold_whole_tiles(size, most, unit):
  plan = plan_chunks(size, size, scale=1.0, chunk=(most, most), tile=(unit, 1))
  assert plan.rows % unit == 0
  assert plan.rows <= max(most, unit)
  # No fewer chunks would do, and none is empty.
  chunks = math.ceil(size / plan.rows)
  assert chunks == math.ceil(size / unit / max(1, most // unit))
  assert plan.rows * (chunks - 1) < size


@pytest.mark.usefixtures('unchecked')
def test_a_chunk_of_nothing_and_a_wrong_name_are_refused(rng):
  given = arrays(rng, 4, 6)
  with pytest.raises(ValueError, match=r'chunk=0 must be at least 1'):
    attention.attend(*given, chunk=0)
  with pytest.raises(ValueError, match=r"chunk=2 belongs to 'chunked'"):
    attention.attend(*given, chunk=2, implementation='dense')
  with pytest.raises(ValueError, match=r"implementation='flash' must be one"):
    attention.attend(*given, implementation='flash')
