"""Tests of the vision transformer and the towers of CLIP and SigLIP."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.backbones.image_tower import ImageTower
from msba_jax.models.backbones.text import VARIANTS as TEXTS
from msba_jax.models.backbones.text import TextSpec, TextTower
from msba_jax.models.backbones.vit import VARIANTS, ViT, ViTSpec
from msba_jax.models.weights import stack_blocks, unstack_blocks

SPEC = ViTSpec(8, 3, 2, patch=4, image=16, registers=2, layer_scale=0.5)
TEXT = TextSpec(8, 2, 2, 20, 6, 4, end_token=19)


@pytest.fixture
def images(rng):
  return jnp.asarray(rng.normal(size=(2, 16, 12, 3)), jnp.float32)


def refilled(module, inputs, rng):
  """Random parameters: initial biases and scales are all alike."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes
  )


def test_the_pyramid_holds_the_blocks_that_are_asked_for(rng, images):
  module = ViT(SPEC, levels=(1, -2, 3))
  params = refilled(module, images, rng)
  apply = jax.jit(module.apply)
  levels = apply(params, images)
  assert [x.shape for x in levels] == [(2, 4, 3, 8)] * 3
  encode = functools.partial(module.apply, method='encode')
  encoded = jax.jit(encode)(params, images)
  assert [x.shape for x in encoded.hidden] == [(2, 15, 8)] * 4
  assert encoded.grid == (4, 3)
  np.testing.assert_allclose(
    levels[-1].reshape(2, 12, 8), encoded.normalized[:, 3:], atol=1e-5
  )
  other = jax.jit(ViT(SPEC, levels=(2, -1)).apply)(params, images)
  chex.assert_trees_all_close(other, levels[1:], atol=1e-5)
  # Images do not meet in a backbone.
  changed = apply(params, images.at[1].set(0.0))
  np.testing.assert_array_equal(changed[-1][0], levels[-1][0])
  assert np.abs(changed[-1][1] - levels[-1][1]).max() > 0


# Parameters without a classifier: DeiT (2020), arXiv 2012.12877, table 1, less
# the 1,000 classes.
@pytest.mark.parametrize(
  ('name', 'millions'), [('tiny', 5.5), ('small', 21.7), ('base', 85.8)]
)
def test_sizes_are_the_published_ones(name, millions):
  pixels = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  shapes = jax.eval_shape(ViT(VARIANTS[name]).init, jax.random.key(0), pixels)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert abs(count / 1e6 - millions) < 0.05


def test_the_clip_text_tower_has_its_published_size():
  ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)
  shapes = jax.eval_shape(
    TextTower(TEXTS['clip_base']).init, jax.random.key(0), ids
  )
  # 49,408 × 512 + 77 × 512 + 12 (12 · 512² + 13 · 512) + 2 · 512 + 512².
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count == 25_296_896 + 39_424 + 12 * 3_152_384 + 1024 + 262_144


@pytest.fixture(scope='module')
def gradients():
  """A module, its parameters, and value and gradient of a loss."""
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(2, 8, 12, 3)), jnp.float32)
  module = ViT(dataclasses.replace(SPEC, depth=2), levels=(1, 2))
  params = refilled(module, images, rng)['params']
  return module, images, params, value_and_grad(module, images)(params)


def value_and_grad(module, images):
  def loss(params):
    levels = module.apply({'params': params}, images)
    return sum(jnp.sum(level**2) for level in levels)

  return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
  ('remat', 'scan'), [(True, False), (False, True), (True, True)]
)
def test_remat_and_scan_give_the_same_gradients(gradients, remat, scan):
  plain, images, params, (value, gradient) = gradients
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))
  module = dataclasses.replace(plain, remat=remat, scan=scan)
  given = stack_blocks(params) if scan else params
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)['params']
  chex.assert_trees_all_equal_shapes(given, shapes)
  same, own = value_and_grad(module, images)(given)
  np.testing.assert_allclose(same, value, rtol=1e-5)
  own = unstack_blocks(own) if scan else own
  chex.assert_trees_all_close(own, gradient, rtol=1e-4, atol=1e-4)


def test_half_precision_computes_with_float32_parameters(rng, images):
  module = ViT(SPEC, dtype=jnp.bfloat16)
  variables = module.init(jax.random.key(0), images)
  chex.assert_trees_all_equal_dtypes(
    variables, jax.tree.map(lambda x: x.astype(jnp.float32), variables)
  )
  hidden = module.apply(variables, images, method='encode').hidden
  assert {x.dtype for x in hidden} == {jnp.dtype(jnp.bfloat16)}
  (level,) = module.apply(variables, images)
  assert level.dtype == jnp.float32
  (exact,) = ViT(SPEC).apply(variables, images)
  difference = np.abs(level - exact).max()
  assert 0 < difference < 0.1


class Keys(nn.Module):
  """Notes what it is told of the tokens."""

  features: int
  grid: tuple[int, int] | None
  prefix: int

  @nn.compact
  def __call__(self, tokens):
    assert tokens.shape[1] == self.prefix + np.prod(self.grid)
    return nn.Dense(self.features)(tokens)


@pytest.mark.parametrize('scan', [False, True])
def test_the_projection_of_keys_can_be_exchanged(images, scan):
  plain, other = (ViT(SPEC, keys=keys, scan=scan) for keys in (None, Keys))
  sizes = []
  for module in (plain, other):
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    sizes.append(sum(x.size for x in jax.tree.leaves(variables)))
  # The same numbers of weights in other places.
  assert sizes[0] == sizes[1]
  block = variables['params']['blocks' if scan else 'block_0']
  assert set(block['attention']) == {'queries_values', 'keys', 'out'}


@pytest.mark.usefixtures('unchecked')
def test_errors_name_the_sizes(images):
  with pytest.raises(ValueError, match=r'spec.patch=5 must divide'):
    ViT(dataclasses.replace(SPEC, patch=5)).init(jax.random.key(0), images)
  for level in (0, 4, -4):
    with pytest.raises(ValueError, match=f'level={level} must be a block'):
      ViT(SPEC, levels=(level,)).init(jax.random.key(0), images)
  bare = ViT(dataclasses.replace(SPEC, class_token=False))
  with pytest.raises(ValueError, match='needs spec'):
    ImageTower(bare, 'class_token').init(jax.random.key(0), images)
  with pytest.raises(ValueError, match='length=7 tokens are more than'):
    TextTower(TEXT).init(jax.random.key(0), jnp.zeros((1, 7), jnp.int32))


@pytest.mark.parametrize('head', ['class_token', 'attention'])
def test_an_image_tower_reads_all_of_its_image(rng, images, head):
  module = ImageTower(ViT(SPEC), head, embedding=5)
  params = refilled(module, images, rng)
  embeddings = jax.jit(module.apply)(params, images)
  assert embeddings.shape == (2, 5 if head == 'class_token' else 8)
  reads = jax.jit(jax.grad(lambda x: jnp.sum(module.apply(params, x)[0] ** 2)))(
    images
  )
  assert np.all(np.abs(reads[0]).max(axis=-1) > 0)
  assert np.all(reads[1] == 0)


def test_nothing_behind_the_end_of_a_text_matters(rng):
  ids = jnp.asarray([[1, 2, 19, 4, 5, 6], [3, 19, 2, 1, 19, 7]])
  module = TextTower(TEXT)
  params = refilled(module, ids, rng)
  apply = jax.jit(module.apply)
  embeddings = apply(params, ids)
  other = jnp.asarray([[1, 2, 19, 9, 9, 9], [3, 19, 9, 9, 9, 9]])
  np.testing.assert_array_equal(apply(params, other), embeddings)
  before = apply(params, ids.at[:, 0].set(8))
  assert np.all(np.abs(before - embeddings).max(axis=1) > 1e-3)
  short = apply(params, ids[:, :3])
  np.testing.assert_allclose(short[0], embeddings[0], atol=1e-5)


def test_a_text_without_causal_mask_is_read_whole(rng):
  ids = jnp.asarray([[1, 2, 3, 4, 5, 6]])
  module = TextTower(dataclasses.replace(TEXT, causal=False, pooled='last'))
  params = refilled(module, ids, rng)
  apply = jax.jit(module.apply)
  embeddings = apply(params, ids)
  for place in range(6):
    changed = apply(params, ids.at[0, place].set(9))
    assert np.abs(changed - embeddings).max() > 1e-3
  stacked = {'params': stack_blocks(params['params'])}
  scanned = dataclasses.replace(module, scan=True)
  np.testing.assert_allclose(scanned.apply(stacked, ids), embeddings, atol=1e-5)
