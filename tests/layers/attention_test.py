"""Tests of `msba_jax.layers.attention`."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from msba_jax.layers import attention

SIZES = st.sampled_from([1, 2, 5])


@pytest.fixture(params=['dense', 'fused', 'chunked'])
def attend(request, monkeypatch):
  """`attend` in every form that runs anywhere, on small arrays too."""
  if request.param == 'chunked':
    return functools.partial(attention.attend, chunk=(2, 3))
  if request.param == 'fused':
    monkeypatch.setattr(attention, 'FUSED_SCORES', 1)
  return functools.partial(attention.attend, implementation='dense')


def reference(queries, keys, values, mask=None, bias=None, scale=None):
  """Attention in float64, a loop over nothing: (n, h, d), (m, h, d)."""
  queries, keys, values = (
    np.asarray(x, np.float64) for x in (queries, keys, values)
  )
  scale = queries.shape[-1] ** -0.5 if scale is None else scale
  scores = np.einsum('...nhd,...mhd->...hnm', queries, keys) * scale
  scores = scores + (0 if bias is None else np.asarray(bias, np.float64))
  allowed = np.broadcast_to(True if mask is None else mask, scores.shape)
  peak = np.max(scores, axis=-1, keepdims=True, initial=-1e300, where=allowed)
  raised = np.where(allowed, np.exp(np.minimum(scores - peak, 0)), 0)
  total = raised.sum(-1, keepdims=True)
  weights = raised / np.where(total > 0, total, 1)
  return weights, np.einsum('...hnm,...mhf->...nhf', weights, values)


def inputs(rng, n=5, m=7, h=2, d=4, f=3, lead=(), size=1.0):
  """Random queries, keys, values, mask and bias."""
  return (
    jnp.asarray(size * rng.normal(size=(*lead, n, h, d)), jnp.float32),
    jnp.asarray(size * rng.normal(size=(*lead, m, h, d)), jnp.float32),
    jnp.asarray(rng.normal(size=(*lead, m, h, f)), jnp.float32),
    jnp.asarray(rng.random((*lead, h, n, m)) < 0.6),
    jnp.asarray(rng.normal(size=(*lead, h, n, m)), jnp.float32),
  )


@hypothesis.given(
  n=SIZES, m=SIZES, h=SIZES, d=SIZES, f=SIZES, seed=st.integers(0, 99),
  size=st.sampled_from([1e-3, 1.0, 30.0]),
)  # fmt: skip
def test_equals_the_float64_reference(attend, n, m, h, d, f, seed, size):
  rng = np.random.default_rng(seed)
  *arrays, mask, bias = inputs(rng, n, m, h, d, f, lead=(2,), size=size)
  weights = attention.attention_weights(*arrays[:2], mask=mask, bias=bias)
  messages = attend(*arrays, mask=mask, bias=bias)
  expected = reference(*arrays, mask, bias)
  # Float32 rounds a product of size s to s · 2⁻²⁴: the scores set the bound.
  tolerance = 1e-6 * (1 + size**2 * d)
  np.testing.assert_allclose(weights, expected[0], atol=tolerance)
  np.testing.assert_allclose(messages, expected[1], atol=4 * tolerance)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('biased', [False, True])
def test_every_option_eager_and_compiled(attend, variant, rng, masked, biased):
  *arrays, mask, bias = inputs(rng)
  options = {'mask': mask if masked else None, 'bias': bias if biased else None}
  messages = variant(attend)(*arrays, **options)
  _, expected = reference(*arrays, **options)
  np.testing.assert_allclose(messages, expected, atol=2e-6)


def test_scale_replaces_the_default(attend, rng):
  *arrays, _, _ = inputs(rng)
  messages = attend(*arrays, scale=0.25)
  np.testing.assert_allclose(
    messages, reference(*arrays, scale=0.25)[1], atol=2e-6
  )


@pytest.mark.parametrize('shape', [(5, 7), (1, 7), (1, 5, 7), (2, 1, 7)])
def test_mask_and_bias_broadcast(attend, rng, shape):
  *arrays, _, _ = inputs(rng)
  mask = jnp.asarray(rng.random(shape) < 0.6)
  bias = jnp.asarray(rng.normal(size=shape), jnp.float32)
  messages = attend(*arrays, mask=mask, bias=bias)
  _, expected = reference(*arrays, mask, bias)
  np.testing.assert_allclose(messages, expected, atol=2e-6)


def test_permuting_queries_and_keys_permutes_the_result(attend, rng):
  queries, keys, values, mask, bias = inputs(rng)
  rows, columns = rng.permutation(5), rng.permutation(7)
  messages = attend(queries, keys, values, mask=mask, bias=bias)
  permuted = attend(
    queries[rows],
    keys[columns],
    values[columns],
    mask=mask[:, rows][:, :, columns],
    bias=bias[:, rows][:, :, columns],
  )
  np.testing.assert_allclose(permuted, messages[rows], atol=1e-6)


def test_rows_sum_to_one_or_to_zero(rng):
  queries, keys, _, mask, _ = inputs(rng)
  mask = mask.at[:, 2].set(False)
  weights = attention.attention_weights(queries, keys, mask=mask)
  sums = np.asarray(weights.sum(-1))
  np.testing.assert_allclose(sums[:, [0, 1, 3, 4]], 1, atol=1e-6)
  assert np.all(sums[:, 2] == 0)


@pytest.mark.parametrize('how', ['mask', 'bias'])
def test_a_row_without_keys_is_zero_and_so_is_its_gradient(
  attend, variant, rng, how
):
  queries, keys, values, _, _ = inputs(rng)
  allowed = np.ones((5, 7), bool)
  allowed[2] = False
  option = (
    {'mask': jnp.asarray(allowed)}
    if how == 'mask'
    else {'bias': jnp.where(allowed, 0.0, -jnp.inf)}
  )

  def total(*arrays):
    return jnp.sum(attend(*arrays, **option) ** 2)

  messages = variant(attend)(queries, keys, values, **option)
  assert np.all(np.asarray(messages[2]) == 0)
  gradients = variant(jax.grad(total, (0, 1, 2)))(queries, keys, values)
  chex.assert_tree_all_finite(gradients)
  assert np.all(np.asarray(gradients[0][2]) == 0)
  assert np.any(np.asarray(gradients[0][1]) != 0)


def test_nothing_flows_to_a_masked_key(attend, rng):
  queries, keys, values, _, _ = inputs(rng)
  mask = jnp.ones((5, 7), bool).at[:, 3].set(False)

  def total(keys, values):
    return jnp.sum(attend(queries, keys, values, mask=mask) ** 2)

  for gradient in jax.grad(total, (0, 1))(keys, values):
    assert np.all(np.asarray(gradient[3]) == 0)
    assert np.all(np.abs(np.asarray(gradient[2])).sum() > 0)


def test_gradients_equal_finite_differences(attend, rng):
  queries, keys, values, mask, bias = inputs(rng, n=3, m=4, d=2)

  @jax.jit
  def messages(queries, keys, values, bias):
    return attend(queries, keys, values, mask=mask, bias=bias)

  modes = ['rev'] if attend.keywords.get('chunk') else ['fwd', 'rev']
  check_grads(
    messages, (queries, keys, values, bias), 2, modes, rtol=2e-2, atol=2e-2
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_result_has_the_dtype_of_the_values(attend, rng, dtype):
  *arrays, mask, _ = inputs(rng)
  arrays = [x.astype(dtype) for x in arrays]
  messages = attend(*arrays, mask=mask)
  chex.assert_type(messages, dtype)
  chex.assert_type(attention.attention_weights(*arrays[:2]), jnp.float32)
  np.testing.assert_allclose(
    np.asarray(messages, np.float64),
    reference(*[np.asarray(x, np.float64) for x in arrays], mask)[1],
    atol=2e-6 if dtype == jnp.float32 else 2e-2,
  )


def test_huge_scores_stay_finite(attend, variant, rng):
  *arrays, mask, _ = inputs(rng, size=1e18)
  gradient = variant(
    jax.grad(lambda q: jnp.sum(attend(q, *arrays[1:], mask=mask)))
  )(arrays[0])
  chex.assert_tree_all_finite((gradient, variant(attend)(*arrays, mask=mask)))


def test_one_key_is_copied(attend, rng):
  *arrays, _, _ = inputs(rng, n=1, m=1)
  np.testing.assert_allclose(attend(*arrays), arrays[2], rtol=1e-6)


def test_no_keys_at_all_give_zero(attend, rng):
  queries, keys, values, _, _ = inputs(rng)
  messages = attend(queries, keys[:0], values[:0])
  assert messages.shape == (5, 2, 3)
  assert np.all(np.asarray(messages) == 0)
  scores = attention.attention_scores(queries, keys[:0])
  assert np.all(np.asarray(attention.log_normalizer(scores)) == -np.inf)


def test_log_normalizer(variant, rng):
  queries, keys, _, mask, bias = inputs(rng, size=8.0)
  mask = mask.at[1, 3].set(False)

  def lse(queries):
    return attention.log_normalizer(
      attention.attention_scores(queries, keys, mask=mask, bias=bias)
    )

  scores = np.asarray(
    attention.attention_scores(queries, keys, mask=mask, bias=bias), np.float64
  )
  with np.errstate(divide='ignore'):
    expected = np.log(np.exp(scores).sum(-1))
  np.testing.assert_allclose(variant(lse)(queries), expected, rtol=1e-5)
  finite = jnp.isfinite(expected)
  gradient = variant(jax.grad(lambda q: jnp.sum(jnp.where(finite, lse(q), 0))))(
    queries
  )
  chex.assert_tree_all_finite(gradient)


def test_equals_jax_where_both_are_defined(attend, rng):
  *arrays, mask, bias = inputs(rng, f=4)
  mask = mask.at[..., 0].set(True)
  expected = jax.nn.dot_product_attention(
    *(x[None] for x in arrays), mask=mask[None], bias=bias[None]
  )[0]
  np.testing.assert_allclose(
    attend(*arrays, mask=mask, bias=bias), expected, atol=2e-6
  )


@pytest.mark.parametrize('devices', [2, 8])
def test_sharded_queries_and_keys_change_nothing(attend, rng, devices):
  *arrays, mask, _ = inputs(rng, n=16, m=16)
  expected = attend(*arrays, mask=mask)
  mesh = jax.make_mesh(
    (devices,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:devices],
  )
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  sharded = [jax.device_put(x, rows) for x in arrays]
  messages = jax.jit(attend, out_shardings=rows)(*sharded, mask=mask)
  assert messages.sharding == rows
  np.testing.assert_allclose(messages, expected, atol=1e-6)


@pytest.mark.usefixtures('unchecked')
def test_wrong_shapes_and_masks_are_named(attend, rng):
  queries, keys, values, mask, bias = inputs(rng)
  with pytest.raises(ValueError, match=r'queries and keys must agree'):
    attend(queries[..., :2], keys, values)
  with pytest.raises(ValueError, match=r'values must match keys'):
    attend(queries, keys, values[:3])
  with pytest.raises(ValueError, match=r'mask must broadcast .*\(2, 5, 7\)'):
    attend(queries, keys, values, mask=mask[..., :3])
  with pytest.raises(ValueError, match=r'bias must broadcast'):
    attend(queries, keys, values, bias=bias[None])
  with pytest.raises(TypeError, match='mask must be Boolean'):
    attend(queries, keys, values, mask=mask.astype(jnp.int32))
