"""Tests of `msba_jax.layers.in_batch`."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from msba_jax.layers import in_batch
from tests.layers.bidirectional_test import SIZES, expected, inputs, softmax


@hypothesis.given(
  n=SIZES, j=st.sampled_from([0, 1, 4]), r=SIZES, h=SIZES, d=SIZES, f=SIZES,
  batch=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_across_images_equals_the_reference(n, j, r, h, d, f, batch, seed):
  batch = batch or j == 0
  arguments = inputs(np.random.default_rng(seed), n, j, r, h, d, f, batch)
  forward, _ = expected(arguments, batch)
  arguments = {
    name: arguments[name]
    for name in ('queries', 'keys', 'values', 'mask', 'bias')
  }
  np.testing.assert_allclose(
    in_batch.attend_across_images(**arguments), forward, atol=5e-6
  )


JOINT = pytest.mark.parametrize(
  'options', [{'implementation': 'dense'}, {'chunk': 3}, {'chunk': (4, 99)}]
)


def joint_inputs(rng, n=3, m=4, t=2, s=3, h=2, d=4, f=3):
  return tuple(
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((n, t, h, d), (m, s, h, d), (m, s, h, f))
  )


def joint_reference(queries, keys, values, mask):
  """In float64: one softmax over all tokens of the images allowed."""
  q, k, v = (np.asarray(x, np.float64) for x in (queries, keys, values))
  scores = np.einsum('nthd,mshd->nthms', q, k) / np.sqrt(q.shape[-1])
  allowed = np.broadcast_to(
    np.broadcast_to(mask, (len(q), len(k)))[:, None, None, :, None],
    scores.shape,
  )
  flat = (*scores.shape[:3], -1)
  weights, _ = softmax(scores.reshape(flat), allowed.reshape(flat))
  return np.einsum('nthms,mshf->nthf', weights.reshape(scores.shape), v)


@JOINT
@pytest.mark.parametrize('shape', [None, (3, 4), (1, 4), (3, 1)])
def test_joint_tokens_equal_the_float64_reference(variant, rng, options, shape):
  given = joint_inputs(rng)
  mask = None if shape is None else jnp.asarray(rng.random(shape) < 0.6)
  if shape == (3, 4):
    mask = mask.at[1].set(False)
  attend = functools.partial(in_batch.attend_joint_tokens, **options)
  messages = variant(attend)(*given, image_mask=mask)
  expected = joint_reference(*given, True if mask is None else mask)
  np.testing.assert_allclose(messages, expected, atol=2e-6)
  if shape == (3, 4):
    assert np.all(np.asarray(messages[1]) == 0)


@JOINT
def test_joint_tokens_have_the_gradients_of_finite_differences(rng, options):
  given = joint_inputs(rng, d=2, f=2)
  mask = jnp.asarray(rng.random((3, 4)) < 0.6)
  attend = jax.jit(
    functools.partial(in_batch.attend_joint_tokens, image_mask=mask, **options)
  )
  check_grads(attend, given, 1, ['rev'], rtol=2e-2, atol=2e-2)


@JOINT
def test_nothing_flows_to_the_tokens_of_a_masked_image(rng, options):
  queries, keys, values = joint_inputs(rng)
  mask = jnp.ones((3, 4), bool).at[:, 2].set(False)

  def total(keys, values):
    messages = in_batch.attend_joint_tokens(
      queries, keys, values, image_mask=mask, **options
    )
    return jnp.sum(messages**2)

  for gradient in jax.grad(total, (0, 1))(keys, values):
    assert np.all(np.asarray(gradient[2]) == 0)
    assert np.all(np.asarray(gradient[1]) != 0)


def test_the_mask_of_tokens_is_never_made(rng):
  given = joint_inputs(rng, n=64, m=64, t=8, s=8, h=1)
  mask = jnp.asarray(rng.random((64, 64)) < 0.6)
  text = (
    jax.jit(functools.partial(in_batch.attend_joint_tokens, chunk=64))
    .lower(*given, image_mask=mask)
    .as_text()
  )
  assert '64x64x' in text
  assert '512x512' not in text


@pytest.mark.usefixtures('unchecked')
def test_a_mask_of_tokens_in_place_of_images_is_refused(rng):
  given = joint_inputs(rng)
  with pytest.raises(ValueError, match=r'broadcast to \(n, m\) = \(3, 4\)'):
    in_batch.attend_joint_tokens(*given, image_mask=jnp.ones((6, 12), bool))
  with pytest.raises(TypeError, match='image_mask must be Boolean'):
    in_batch.attend_joint_tokens(*given, image_mask=jnp.ones((3, 4)))
