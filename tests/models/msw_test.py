"""Tests of `msba_jax.models.msw`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from msba_jax.models.msw import JoinedHeads, MultiScaleWindows


def normalized(x, scale, bias):
  """Layer normalisation in float64."""
  x = x - x.mean(axis=-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
  return x * scale + bias


def test_joined_heads_are_the_last_layers_of_windows(rng):
  grids = [
    jnp.asarray(rng.normal(size=(3, side, side, 5)), jnp.float32)
    for side in (6, 4)
  ]
  whole = MultiScaleWindows(8, 4, parts=(1, 2))
  params = jax.jit(whole.init)(jax.random.key(0), grids)['params']
  leaves, tree = jax.tree.flatten(params)
  leaves = [x + 0.3 * rng.normal(size=x.shape).astype('f4') for x in leaves]
  params = jax.tree.unflatten(tree, leaves)
  expected, _ = jax.jit(whole.apply)({'params': params}, grids)

  first, last = {}, {}
  for i in range(2):
    level = dict(params[f'level_{i}'])
    last[f'out_{i}'] = level.pop('out')
    last[f'norm_{i}'] = level.pop('norm_regions')
    first[f'level_{i}'] = level
  module = MultiScaleWindows(8, 4, parts=(1, 2), apart=True)
  parts, _ = jax.jit(module.apply)({'params': first}, grids)
  chex.assert_shape(parts, (2, 3, 5, 16))
  join = jax.jit(functools.partial(JoinedHeads(4).apply, {'params': last}))
  for factors in (None, jnp.ones((3, 4))):
    np.testing.assert_allclose(join(parts, factors), expected, atol=2e-6)

  factors = rng.random((3, 4))
  pooled, messages = np.split(np.asarray(parts, np.float64), 2, axis=-1)
  messages = messages * np.repeat(factors, 2, axis=1)[None, :, None]
  found = join(parts, jnp.asarray(factors, jnp.float32))
  for i in range(2):
    out, norm = (
      {k: np.asarray(x, np.float64) for k, x in last[f'{name}_{i}'].items()}
      for name in ('out', 'norm')
    )
    level = pooled[i] + messages[i] @ out['kernel'] + out['bias']
    np.testing.assert_allclose(found[i], normalized(level, **norm), atol=1e-5)
