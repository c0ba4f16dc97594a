"""Tests of the ResNet: values, statistics, sizes, names, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from numpy.lib.stride_tricks import sliding_window_view

from msba_jax.models.backbones import resnet

SMALL = resnet.ResNetSpec((1, 2), (8, 16), stem=4, levels=2)


def refilled(variables, rng):
  """Random numbers in place of all arrays; variances are positive."""

  def fill(path, array):
    values = 0.5 * rng.normal(size=array.shape)
    values = 0.5 + np.abs(values) if path[-1].key == 'var' else values
    return jnp.asarray(values, array.dtype)

  return jax.tree.map_with_path(fill, variables)


def made(model, rng, images):
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  return refilled(shapes, rng)


def reference_conv(grid, variables, size, stride):
  kernel, norm, stored = jax.tree.map(
    lambda x: np.asarray(x, np.float64),
    (
      variables['params']['conv']['kernel'],
      variables['params']['norm'],
      variables['batch_stats']['norm'],
    ),
  )
  pad = size // 2
  padded = np.pad(grid, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  places = sliding_window_view(padded, (size, size), (1, 2))
  out = np.einsum('nyxdij,ijdf->nyxf', places[:, ::stride, ::stride], kernel)
  scaled = (out - stored['mean']) / np.sqrt(stored['var'] + 1e-5)
  return scaled * norm['scale'] + norm['bias']


@pytest.mark.parametrize('stride', [1, 2])
def test_a_bottleneck_equals_the_reference(rng, variant, stride):
  grid = jnp.asarray(rng.normal(size=(2, 5, 4, 6)), jnp.float32)
  block = resnet.Bottleneck(8, stride, True)
  variables = made(block, rng, grid)

  def conv(inputs, name, size, stride):
    of = {kind: variables[kind][name] for kind in variables}
    return reference_conv(inputs, of, size, stride)

  inner = np.maximum(conv(np.asarray(grid, np.float64), 'conv_0', 1, 1), 0)
  inner = np.maximum(conv(inner, 'conv_1', 3, stride), 0)
  inner = conv(inner, 'conv_2', 1, 1)
  short = conv(np.asarray(grid, np.float64), 'shortcut', 1, stride)
  np.testing.assert_allclose(
    variant(block.apply)(variables, grid),
    np.maximum(inner + short, 0),
    rtol=1e-4,
    atol=1e-5,
  )


def test_the_pyramid(rng):
  images = jnp.asarray(rng.normal(size=(2, 33, 16, 3)), jnp.float32)
  model = resnet.ResNet(SMALL)
  variables = made(model, rng, images)
  apply = jax.jit(model.apply, static_argnames='train')
  levels = apply(variables, images)
  assert [level.shape for level in levels] == [(2, 9, 4, 8), (2, 5, 2, 16)]
  chex.assert_tree_all_finite(levels)
  # Stored statistics: images do not meet, in training neither.
  changed = apply(variables, images.at[1].set(0.0), train=True)
  for level, other in zip(levels, changed, strict=True):
    np.testing.assert_array_equal(level[0], other[0])
    assert np.abs(level[1] - other[1]).max() > 0


def test_frozen_statistics_never_change(rng):
  images = jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)
  model = resnet.ResNet(SMALL)
  variables = made(model, rng, images)
  _, updated = jax.jit(
    lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats'])
  )(variables, images)
  chex.assert_trees_all_equal(updated['batch_stats'], variables['batch_stats'])


def test_other_statistics_move_a_tenth_to_those_of_the_batch(rng):
  images = jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)
  model = resnet.ResNet(SMALL, frozen_statistics=False)
  variables = made(model, rng, images)
  apply = jax.jit(
    lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats'])
  )
  levels, updated = apply(variables, images)
  kernel = np.asarray(variables['params']['stem']['conv']['kernel'])
  padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)))
  places = sliding_window_view(padded, (7, 7), (1, 2))[:, ::2, ::2]
  batch = np.einsum('nyxdij,ijdf->nyxf', places, kernel)
  before = variables['batch_stats']['stem']['norm']
  after = updated['batch_stats']['stem']['norm']
  for name, value in (
    ('mean', batch.mean((0, 1, 2))),
    ('var', batch.var((0, 1, 2))),
  ):
    np.testing.assert_allclose(
      after[name], 0.9 * before[name] + 0.1 * value, rtol=1e-4, atol=1e-5
    )
  # The statistics are of the batch: what one image is changes the other's.
  changed, _ = apply(variables, images.at[1].set(0.0))
  assert np.abs(levels[0][0] - changed[0][0]).max() > 0
  # Outside of training they are the stored ones.
  frozen = jax.jit(resnet.ResNet(SMALL).apply)(variables, images)
  chex.assert_trees_all_close(
    jax.jit(model.apply)(variables, images), frozen, rtol=1e-6
  )


def test_half_precision_computes_and_returns_but_does_not_keep(rng):
  images = jnp.asarray(rng.normal(size=(1, 8, 8, 3)), jnp.float32)
  model = resnet.ResNet(SMALL, dtype=jnp.bfloat16)
  variables, levels = jax.eval_shape(
    lambda x: model.init_with_output(jax.random.key(0), x)[::-1], images
  )
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  assert {x.dtype for x in levels} == {jnp.dtype('bfloat16')}


# Of torchvision's table of models, less the classifier of 2,049,000.
@pytest.mark.parametrize(
  ('name', 'count'), [('resnet_50', 23_508_032), ('resnet_101', 42_500_160)]
)
def test_variants_have_the_published_number_of_parameters(name, count):
  model = resnet.ResNet(resnet.VARIANTS[name])
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == count


@pytest.mark.parametrize(
  'spec',
  [
    SMALL,
    resnet.ResNetSpec((2, 1), (8, 8), stem=8, levels=1),
    resnet.VARIANTS['resnet_50'],
  ],
)
def test_names_cover_every_array_once(spec):
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(resnet.ResNet(spec).init, jax.random.key(0), images)
  paths = [tensor.path for tensor in resnet.resnet_names(spec)]
  assert sorted(paths) == sorted(traverse_util.flatten_dict(shapes))


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    (resnet.ResNetSpec((1, 1), (8,)), 'one number of blocks a stage'),
    (resnet.ResNetSpec((1,), (8,), levels=2), r'spec\.levels=2'),
    (resnet.ResNetSpec((1,), (8,), levels=0), r'spec\.levels=0'),
    (resnet.ResNetSpec((1,), (6,), levels=1), 'four must divide'),
  ],
)
def test_errors_name_the_sizes(spec, message):
  with pytest.raises(ValueError, match=message):
    resnet.ResNet(spec).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  with pytest.raises(ValueError, match=message):
    list(resnet.resnet_names(spec))
