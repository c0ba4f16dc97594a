"""Tests of the backbones: pyramids, sizes, determinism, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.backbones import conv, stem_vit


@pytest.mark.parametrize(
  ('backbone', 'grids'),
  [
    (
      conv.ConvNet(conv.ConvSpec((4, 8, 16), (1, 2, 1), levels=2)),
      [(2, 4, 4, 8), (2, 2, 2, 16)],
    ),
    (
      conv.ConvNet(conv.ConvSpec((4, 6), (1, 1), stem_stride=1, levels=2)),
      [(2, 16, 16, 4), (2, 8, 8, 6)],
    ),
    (
      stem_vit.StemViT(stem_vit.StemViTSpec(8, 2, 2, patch=4)),
      [(2, 8, 8, 4), (2, 4, 4, 8), (2, 4, 4, 8)],
    ),
    (
      stem_vit.StemViT(stem_vit.StemViTSpec(8, 1, 2, patch=8)),
      [(2, 4, 4, 4), (2, 2, 2, 8), (2, 2, 2, 8)],
    ),
  ],
)
def test_the_pyramid(rng, backbone, grids):
  images = jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)
  variables = jax.jit(backbone.init)(jax.random.key(0), images)
  apply = jax.jit(backbone.apply)
  levels = apply(variables, images)
  assert [level.shape for level in levels] == grids
  chex.assert_tree_all_finite(levels)
  # Images do not meet in a backbone.
  changed = apply(variables, images.at[1].set(0.0))
  for level, other in zip(levels, changed, strict=True):
    np.testing.assert_array_equal(level[0], other[0])
    assert np.abs(level[1] - other[1]).max() > 0


@pytest.mark.parametrize('name', stem_vit.VARIANTS)
def test_variants_of_the_vit_can_be_built(name):
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  model = stem_vit.StemViT(stem_vit.VARIANTS[name])
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  spec = stem_vit.VARIANTS[name]
  # 12 d² a block, plus stem and norms.
  assert count > 12 * spec.features**2 * spec.depth


@pytest.mark.usefixtures('unchecked')
def test_errors_name_the_sizes():
  images = jnp.zeros((1, 12, 12, 3))
  key = jax.random.key(0)
  with pytest.raises(ValueError, match='power of two'):
    stem_vit.StemViT(stem_vit.StemViTSpec(8, 1, 2, patch=6)).init(key, images)
  with pytest.raises(ValueError, match='must divide'):
    stem_vit.StemViT(stem_vit.StemViTSpec(8, 1, 2, patch=8)).init(key, images)
  with pytest.raises(ValueError, match=r'num_heads=3 must divide features=8'):
    stem_vit.StemViT(stem_vit.StemViTSpec(8, 1, 3, patch=4)).init(key, images)
  with pytest.raises(ValueError, match='one number of blocks a stage'):
    conv.ConvNet(conv.ConvSpec((4, 8), (1,))).init(key, images)
