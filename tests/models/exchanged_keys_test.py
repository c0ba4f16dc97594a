"""Tests of manifold keys in every attention that takes other keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.backbones.swin import Swin, SwinSpec
from msba_jax.models.backbones.vit import ViT, ViTSpec
from msba_jax.models.bcp import BidirectionalContext
from msba_jax.models.context import batch
from msba_jax.models.manifold_keys import ManifoldKeys
from msba_jax.models.msw import MultiScaleWindows


def modules(keys):
  return {
    'vit': ViT(ViTSpec(8, 1, 2, patch=4, image=16), keys=keys),
    'scanned vit': ViT(
      ViTSpec(8, 2, 2, patch=4, image=16), keys=keys, scan=True, remat=True
    ),
    'swin': Swin(
      SwinSpec(8, (2,), (2,), window=2, patch=4, levels=1), keys=keys
    ),
    'msw': MultiScaleWindows(8, 2, parts=(1, 2), keys=keys),
    'bcp': BidirectionalContext(2, keys=keys),
  }


def call(name, module, variables, inputs, **options):
  context = (batch(jnp.ones(3, bool)),) if name == 'bcp' else ()
  inputs = (inputs,) if name == 'msw' else inputs
  return module.apply(variables, inputs, *context, **options)


def initial(name, module, inputs):
  context = (batch(jnp.ones(3, bool)),) if name == 'bcp' else ()
  inputs = (inputs,) if name == 'msw' else inputs
  return module.init(jax.random.key(0), inputs, *context)


# Only `spatial` sees the grid, and only `unbalanced_atlas` sows a penalty.
CASES = (
  *((name, 'vanilla') for name in modules(None)),
  *((name, 'spatial') for name in modules(None)),
  ('vit', 'simple'),
  ('scanned vit', 'unbalanced_atlas'),
  ('bcp', 'unbalanced_atlas'),
)


@pytest.mark.parametrize(('name', 'variant'), CASES)
def test_every_attention_takes_manifold_keys(rng, name, variant):
  keys = functools.partial(ManifoldKeys, variant=variant, charts=2)
  module = modules(keys)[name]
  shape = (2, 3, 4, 8) if name == 'bcp' else (3, 16, 16, 3)
  shape = (3, 4, 4, 8) if name == 'msw' else shape
  inputs = jnp.asarray(rng.normal(size=shape), jnp.float32)
  if name == 'bcp' and variant == 'spatial':
    with pytest.raises(ValueError, match='grid'):
      initial(name, module, inputs)
    return
  variables = initial(name, module, inputs)
  assert set(variables) == {'params'}

  def loss(variables):
    result, state = call(
      name, module, variables, inputs, mutable=['penalties', 'intermediates']
    )
    values = jax.tree.leaves(result)
    return sum(jnp.sum(jnp.sin(3 * x)) for x in values), state

  gradient, state = jax.jit(jax.grad(loss, has_aux=True))(variables)
  scales = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
    if 'scales' in jax.tree_util.keystr(path)
  ]
  assert scales
  assert all(np.abs(x).max() > 0 for x in scales)
  penalties = jax.tree.leaves(state.get('penalties', {}))
  assert bool(penalties) == (variant == 'unbalanced_atlas')
