"""Tests of `msba_jax.layers.bidirectional`."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from msba_jax.layers import bidirectional, in_batch

SIZES = st.sampled_from([1, 3])


def softmax(scores, allowed):
  """Softmax over the last axis in float64, zero where nothing is allowed."""
  raised = np.where(allowed, np.exp(scores), 0)
  total = raised.sum(-1, keepdims=True)
  return raised / np.where(total > 0, total, 1), total[..., 0]


def reference(q, k, v, v_back, k_asking, q_context, askers, mask, bias):
  """Both messages of the specification in float64, region by region."""
  n, r, h, d = q.shape
  forward, backward = (np.zeros((n, r, h, v.shape[-1])) for _ in range(2))
  for i in range(r):
    for j in range(h):
      scores = q[:, i, j] @ k[:, i, j].T / np.sqrt(d) + bias
      weights, total = softmax(scores, mask)
      forward[:, i, j] = weights @ v[:, i, j]
      back = k_asking[:, i, j] @ q_context[:, i, j].T / np.sqrt(d)
      back[:, askers:] += bias[:, askers:]
      allowed = mask.copy()
      for m in range(askers):
        allowed[:, m] &= total[m] > 0
        back[:, m] += bias[m, :n] - np.log(max(total[m], 1e-300))
      backward[:, i, j] = softmax(back, allowed)[0] @ v_back[:, i, j]
  return forward, backward


def inputs(rng, n=4, j=0, r=2, h=2, d=3, f=2, batch=True):
  m = j + (n if batch else 0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    'queries': normal(n, r, h, d),
    'keys': normal(m, r, h, d),
    'values': normal(m, r, h, f),
    'backward_values': normal(m, r, h, f),
    'mask': jnp.asarray(rng.random((n, m)) < 0.7),
    'bias': normal(n, m),
  } | (
    {'foreign_queries': normal(j, r, h, d), 'asking_keys': normal(n, r, h, d)}
    if j
    else {}
  )


def expected(arguments, batch):
  a = {name: np.asarray(x, np.float64) for name, x in arguments.items()}
  n = a['queries'].shape[0]
  askers = n if batch else 0
  return reference(
    a['queries'], a['keys'], a['values'], a['backward_values'],
    a.get('asking_keys', a['keys'][:n]),
    np.concatenate(
      [a['queries'][:askers], a.get('foreign_queries', a['queries'][:0])]
    ),
    askers, a['mask'].astype(bool), a['bias'],
  )  # fmt: skip


@hypothesis.given(
  n=SIZES, j=st.sampled_from([0, 1, 4]), r=SIZES, h=SIZES, d=SIZES, f=SIZES,
  batch=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_both_directions_equal_the_reference(n, j, r, h, d, f, batch, seed):
  batch = batch or j == 0
  arguments = inputs(np.random.default_rng(seed), n, j, r, h, d, f, batch)
  forward, backward = expected(arguments, batch)
  messages = bidirectional.bidirectional_messages(**arguments)
  np.testing.assert_allclose(messages.forward, forward, atol=5e-6)
  np.testing.assert_allclose(messages.backward, backward, atol=5e-6)


def test_eager_and_compiled_agree(variant, rng):
  arguments = inputs(rng, j=3)
  messages = variant(bidirectional.bidirectional_messages)(**arguments)
  forward, backward = expected(arguments, True)
  np.testing.assert_allclose(messages.forward, forward, atol=5e-6)
  np.testing.assert_allclose(messages.backward, backward, atol=5e-6)


def test_backward_weights_are_the_transpose_renormalised(rng):
  n = 4
  arguments = inputs(rng, n, r=1, h=1, f=n)
  identity = jnp.eye(n)[:, None, None, :]
  arguments |= {'values': identity, 'backward_values': identity}
  arguments['mask'] = jnp.ones((n, n), bool)
  messages = bidirectional.bidirectional_messages(**arguments)
  weights = np.asarray(messages.weights[0, 0], np.float64)
  transposed = weights.T / weights.T.sum(1, keepdims=True)
  np.testing.assert_allclose(messages.backward[:, 0, 0], transposed, atol=1e-6)
  np.testing.assert_allclose(messages.forward[:, 0, 0], weights, atol=1e-6)


def test_permuting_the_batch_permutes_the_messages(rng):
  arguments = inputs(rng)
  order = rng.permutation(4)
  permuted = {
    name: x[order][:, order] if x.ndim == 2 else x[order]
    for name, x in arguments.items()
  }
  messages = bidirectional.bidirectional_messages(**arguments)
  again = bidirectional.bidirectional_messages(**permuted)
  np.testing.assert_allclose(again.forward, messages.forward[order], atol=1e-6)
  np.testing.assert_allclose(
    again.backward, messages.backward[order], atol=1e-6
  )


def test_padding_has_no_influence_and_no_gradient(variant, rng):
  arguments = inputs(rng)
  valid = jnp.array([True, True, False, True])
  arguments['mask'] = jnp.broadcast_to(valid[None], (4, 4))

  def total(arrays):
    messages = bidirectional.bidirectional_messages(**(arguments | arrays))
    kept = valid[:, None, None, None]
    return sum(
      jnp.sum(jnp.where(kept, x, 0) ** 2)
      for x in (messages.forward, messages.backward)
    )

  names = ('queries', 'keys', 'values', 'backward_values')
  gradients = variant(jax.grad(total))(
    {name: arguments[name] for name in names}
  )
  for name in names:
    assert np.all(np.asarray(gradients[name][2]) == 0), name
    assert np.any(np.asarray(gradients[name][1]) != 0), name


def test_an_image_without_context_gets_zero(variant, rng):
  arguments = inputs(rng, j=2)
  arguments['mask'] = arguments['mask'].at[1].set(False)

  def messages(queries):
    return bidirectional.bidirectional_messages(
      **(arguments | {'queries': queries})
    )

  result = variant(messages)(arguments['queries'])
  assert np.all(np.asarray(result.forward[1]) == 0)
  assert np.all(np.asarray(result.backward[1]) == 0)
  chex.assert_tree_all_finite(
    jax.grad(lambda q: sum(jnp.sum(x) for x in messages(q)[:2]))(
      arguments['queries']
    )
  )


def test_attention_runs_over_images_not_over_heads(rng):
  arguments = inputs(rng, n=3, r=2, h=2)
  arguments['mask'] = jnp.ones((3, 3), bool)

  def forward(values):
    return bidirectional.bidirectional_messages(
      **(arguments | {'values': values})
    ).forward

  jacobian = np.asarray(jax.jacobian(forward)(arguments['values']))
  # (n, r, h, f, m, r, h, f): images mix, regions and heads do not.
  mixes = np.abs(jacobian).max((3, 7))
  assert np.all(mixes[:, 0, 0, :, 0, 0] > 0)
  assert np.all(mixes[:, 0, :, :, 1, :] == 0)
  assert np.all(mixes[:, :, 0, :, :, 1] == 0)


def test_gradients_equal_finite_differences(rng):
  arguments = inputs(rng, n=3, j=2, r=1, h=1, d=2)
  arguments['mask'] = arguments['mask'].at[:, 0].set(True)
  mask = arguments.pop('mask')

  @jax.jit
  def messages(arrays):
    return bidirectional.bidirectional_messages(**arrays, mask=mask)[:2]

  check_grads(messages, (arguments,), 1, ('rev',), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_result_has_the_dtype_of_the_values(rng, dtype):
  arguments = {
    name: x if x.ndim == 2 else x.astype(dtype)
    for name, x in inputs(rng, j=2).items()
  }
  messages = bidirectional.bidirectional_messages(**arguments)
  chex.assert_type([messages.forward, messages.backward], dtype)


def test_an_image_alone_reads_itself(rng):
  arguments = inputs(rng, n=1)
  arguments['mask'] = jnp.ones((1, 1), bool)
  messages = bidirectional.bidirectional_messages(**arguments)
  np.testing.assert_allclose(messages.forward, arguments['values'], rtol=1e-6)
  np.testing.assert_allclose(
    messages.backward, arguments['backward_values'], rtol=1e-6
  )


@pytest.mark.parametrize('devices', [2, 8])
def test_sharded_over_the_batch_changes_nothing(rng, devices):
  arguments = inputs(rng, n=16)
  expected_messages = bidirectional.bidirectional_messages(**arguments)
  mesh = jax.make_mesh(
    (devices,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:devices],
  )
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  messages = jax.jit(bidirectional.bidirectional_messages)(
    **jax.device_put(arguments, rows)
  )
  chex.assert_trees_all_close(messages, expected_messages, atol=1e-6)


@pytest.mark.usefixtures('unchecked')
def test_wrong_contexts_are_named(rng):
  arguments = inputs(rng, n=4, j=2)
  with pytest.raises(ValueError, match='context of 6 images is neither the 0'):
    bidirectional.bidirectional_messages(
      **(arguments | {'foreign_queries': None})
    )
  arguments = inputs(rng, n=4, j=2, batch=False) | {'asking_keys': None}
  with pytest.raises(ValueError, match='needs asking_keys'):
    bidirectional.bidirectional_messages(**arguments)


@pytest.mark.parametrize(('j', 'batch'), [(0, True), (3, True), (3, False)])
def test_a_bias_of_each_region_equals_the_reference(variant, rng, j, batch):
  arguments = inputs(rng, j=j, r=3, batch=batch)
  shape = (3, 1, *arguments['mask'].shape)
  arguments['bias'] = jnp.asarray(rng.normal(size=shape), jnp.float32)
  messages = variant(bidirectional.bidirectional_messages)(**arguments)
  for i in range(3):
    region = {
      name: x if name == 'mask' else x[:, i : i + 1]
      for name, x in arguments.items()
    } | {'bias': arguments['bias'][i, 0]}
    forward, backward = expected(region, batch)
    found = (x[:, i : i + 1] for x in messages[:2])
    for message, other in zip(found, (forward, backward), strict=True):
      np.testing.assert_allclose(message, other, atol=5e-6)


@pytest.mark.parametrize('batch', [True, False])
def test_the_weights_give_the_messages(rng, batch):
  arguments = inputs(rng, j=3, batch=batch)
  arguments['mask'] = arguments['mask'].at[1].set(False)
  messages = bidirectional.bidirectional_messages(**arguments)
  values = [arguments.pop(x) for x in ('values', 'backward_values')]
  weights = bidirectional.bidirectional_weights(**arguments)
  np.testing.assert_array_equal(weights.forward, messages.weights)
  for message, direction, read in zip(
    messages[:2], weights, values, strict=True
  ):
    np.testing.assert_allclose(
      message, jnp.einsum('rhnm,mrhf->nrhf', direction, read), atol=1e-6
    )
    np.testing.assert_array_equal(direction[:, :, 1], 0)
  looks = np.asarray(arguments['mask']).any(axis=-1)
  total = np.sum(weights.forward, axis=-1)
  np.testing.assert_allclose(total[:, :, looks], 1, atol=1e-6)


def test_they_are_found_beside_the_attention_of_a_batch():
  for name in ('Messages', 'bidirectional_messages'):
    assert getattr(in_batch, name) is getattr(bidirectional, name)
