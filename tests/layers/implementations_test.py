"""Tests of `msba_jax.layers.implementations`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from msba_jax.layers import attention
from msba_jax.layers.implementations import choose_implementation


def shaped(n=1024, m=1024, d=64, f=64, dtype=jnp.bfloat16):
  """Shapes and dtypes of queries, keys and values."""
  return tuple(
    jax.ShapeDtypeStruct((2, length, 4, size), dtype)
    for length, size in ((n, d), (m, d), (m, f))
  )


@pytest.mark.parametrize(
  ('platform', 'given', 'expected'),
  [
    ('cpu', shaped(), 'chunked'),
    ('cpu', shaped(n=64, m=64), 'dense'),
    ('cpu', shaped(n=16, m=32768), 'chunked'),
    ('gpu', shaped(), 'cudnn'),
    ('gpu', shaped(dtype=jnp.float32), 'chunked'),
    ('gpu', shaped(f=32), 'chunked'),
    ('gpu', shaped(d=20, f=20), 'chunked'),
    ('gpu', shaped(n=64, m=64), 'dense'),
    ('tpu', shaped(), 'splash'),
    ('tpu', shaped(d=128, f=64, dtype=jnp.float32), 'splash'),
    ('tpu', shaped(m=1000), 'chunked'),
    ('tpu', shaped(d=32), 'chunked'),
  ],
)
def test_the_choice_follows_platform_shapes_and_dtypes(
  platform, given, expected
):
  choose = functools.partial(choose_implementation, platform=platform)
  assert choose(*given) == expected
  masked = jnp.ones(given[1].shape[1], bool)
  if expected in ('cudnn', 'splash'):
    assert choose(*given, mask=masked) == 'chunked'
    assert choose(*given, bias=masked) == 'chunked'
  else:
    assert choose(*given, mask=masked) == expected


def test_large_inputs_are_chunked_by_themselves(rng):
  given = [
    jnp.asarray(rng.normal(size=(600, 1, 4)), jnp.float32) for _ in range(3)
  ]
  chunked = jax.jit(attention.attend).lower(*given).as_text()
  assert 'while' in chunked
  small = jax.jit(attention.attend).lower(*(x[:60] for x in given)).as_text()
  assert 'while' not in small
  np.testing.assert_allclose(
    attention.attend(*given),
    attention.attend(*given, implementation='dense'),
    atol=1e-6,
  )


@pytest.mark.parametrize('d', [64, 128])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_splash_is_compiled_for_tpus_forward_and_backward(d, dtype):
  given = shaped(256, 384, d, d, dtype)

  def messages(*given):
    return attention.attend(*given, implementation='splash')

  def gradients(*given):
    def total(*given):
      return jnp.sum(messages(*given).astype(jnp.float32))

    return jax.grad(total, (0, 1, 2))(*given)

  for function, outputs in ((messages, given[:1]), (gradients, given)):
    lowered = export.export(jax.jit(function), platforms=['tpu'])(*given)
    assert 'tpu_custom_call' in lowered.mlir_module()
    assert [(x.shape, x.dtype) for x in lowered.out_avals] == [
      (x.shape, x.dtype) for x in outputs
    ]


@pytest.mark.slow
def test_splash_has_the_values_and_gradients_of_dense(rng):
  queries, keys, values = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((1, 128, 2, 64), (1, 256, 2, 64), (1, 256, 2, 64))
  )

  def total(*given, implementation):
    messages = attention.attend(
      *given, scale=0.2, implementation=implementation
    )
    return jnp.sum(messages**2)

  dense = jax.value_and_grad(total, (0, 1, 2))(
    queries, keys, values, implementation='dense'
  )
  with pltpu.force_tpu_interpret_mode():
    splash = jax.jit(
      jax.value_and_grad(total, (0, 1, 2)), static_argnames='implementation'
    )(queries, keys, values, implementation='splash')
  for ours, theirs in zip(
    jax.tree.leaves(splash), jax.tree.leaves(dense), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures('unchecked')
def test_what_an_implementation_does_not_take_is_said():
  queries, keys, values = (jnp.zeros(x.shape, x.dtype) for x in shaped(8, 8))
  with pytest.raises(ValueError, match='multiples of 128 queries and keys'):
    attention.attend(queries, keys, values, implementation='splash')
  with pytest.raises(ValueError, match='neither mask nor bias'):
    attention.attend(
      queries, keys, values, mask=jnp.ones((8, 8), bool),
      implementation='splash',
    )  # fmt: skip
  full = [x.astype(jnp.float32) for x in (queries, keys, values)]
  with pytest.raises(ValueError, match='bfloat16 or float16, not float32'):
    attention.attend(*full, implementation='cudnn')
  with pytest.raises(ValueError, match='one feature size'):
    attention.attend(queries, keys, values[..., :4], implementation='cudnn')


@pytest.mark.skipif(
  not any(x.platform == 'gpu' for x in jax.devices()), reason='needs a GPU'
)
@pytest.mark.parametrize('masked', [False, True])
def test_cudnn_has_the_values_and_gradients_of_dense(rng, masked):
  queries, keys, values = (
    jnp.asarray(rng.normal(size=(2, 256, 4, 64)), jnp.bfloat16)
    for _ in range(3)
  )
  mask = jnp.asarray(rng.random((256, 256)) < 0.5).at[3].set(False)

  def total(*given, implementation):
    messages = attention.attend(
      *given, mask=mask if masked else None, implementation=implementation
    )
    return jnp.sum(messages.astype(jnp.float32) ** 2)

  found, expected = (
    jax.value_and_grad(total, (0, 1, 2))(
      queries, keys, values, implementation=name
    )
    for name in ('cudnn', 'dense')
  )
  for ours, theirs in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(
      np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=3e-2
    )
