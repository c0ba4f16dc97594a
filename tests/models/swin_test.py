"""Tests of the Swin Transformer: values, options, names, errors."""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.test_util import check_grads

from msba_jax.models.backbones import swin, swin_blocks

SMALL = swin.SwinSpec(4, (2, 1), (1, 2), window=2, patch=2, levels=2)


def made(model, rng, inputs):
  """Parameters of a module, all of them random."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
  return jax.tree.map(
    lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes
  )


def near(height, width, window, shift):
  """(p, p): in one window after the shift, and neighbours before it."""
  places = np.indices((height, width)).reshape(2, -1).T
  rolled = (places - shift) % (height, width) // window
  same = (rolled[:, None] == rolled[None]).all(-1)
  return same & (np.abs(places[:, None] - places[None]) < window).all(-1)


def reference_norm(x, of):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + 1e-5) * of['scale'] + of['bias']


def reference_block(grid, params, num_heads, window, shift):
  """Over all pairs of tokens of one padded image."""
  grid, params = jax.tree.map(
    lambda x: np.asarray(x, np.float64), (grid, params)
  )
  height, width, d = grid.shape
  own = params['attention']
  tokens = np.pad(
    reference_norm(grid, params['norm_attention']),
    ((0, -height % window), (0, -width % window), (0, 0)),
  )
  full = tokens.shape[:2]
  tokens = tokens.reshape(-1, d)
  qkv = tokens @ own['qkv']['kernel'] + own['qkv']['bias']
  q, k, v = qkv.reshape(-1, 3, num_heads, d // num_heads).transpose(1, 2, 0, 3)
  side = math.isqrt(len(own['bias']))
  places = np.indices(full).reshape(2, -1).T
  gap = np.clip(places[:, None] - places[None] + side // 2, 0, side - 1)
  bias = own['bias'][gap[..., 0] * side + gap[..., 1]].transpose(2, 0, 1)
  scores = q @ k.transpose(0, 2, 1) / np.sqrt(d // num_heads) + bias
  weights = np.exp(scores) * near(*full, window, shift)
  out = (weights / weights.sum(-1, keepdims=True)) @ v
  out = out.transpose(1, 0, 2).reshape(-1, d) @ own['out']['kernel']
  out = (out + own['out']['bias']).reshape(*full, d)
  grid = grid + out[:height, :width]
  inner, outer = (params['feed_forward'][name] for name in ('inner', 'outer'))
  hidden = reference_norm(grid, params['norm_feed_forward']) @ inner['kernel']
  hidden = hidden + inner['bias']
  hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
  return grid + hidden @ outer['kernel'] + outer['bias']


@pytest.mark.parametrize(
  ('shape', 'shifted', 'side', 'shift'),
  [
    ((5, 7), False, 3, 0),
    ((5, 7), True, 3, 1),
    # No larger than the window in one direction: not shifted, or smaller too.
    ((3, 5), True, 3, 0),
    ((2, 5), True, 2, 0),
  ],
)
def test_a_block_equals_the_reference(
  rng, variant, shape, shifted, side, shift
):
  grid = jnp.asarray(rng.normal(size=(2, *shape, 4)), jnp.float32)
  block = swin_blocks.SwinBlock(2, 3, shifted, ratio=2)
  variables = made(block, rng, grid)
  found = variant(block.apply)(variables, grid)
  for image, expected in zip(found, grid, strict=True):
    expected = reference_block(expected, variables['params'], 2, side, shift)
    np.testing.assert_allclose(image, expected, rtol=1e-4, atol=1e-5)


def test_gradients_equal_finite_differences(rng):
  grid = jnp.asarray(rng.normal(size=(1, 3, 4, 2)), jnp.float32)
  block = swin_blocks.SwinBlock(1, 2, True, ratio=1)
  check_grads(
    jax.jit(block.apply),
    (made(block, rng, grid), grid),
    1,
    ['rev'],
    rtol=2e-2,
    atol=2e-2,
  )


def test_four_neighbours_become_one(rng):
  grid = jnp.asarray(rng.normal(size=(1, 3, 2, 2)), jnp.float32)
  merge = swin_blocks.PatchMerging()
  variables = made(merge, rng, grid)
  full = np.pad(np.asarray(grid, np.float64), ((0, 0), (0, 1), (0, 0), (0, 0)))
  joined = np.concatenate(
    [full[:, y::2, x::2] for x in range(2) for y in range(2)], axis=-1
  )
  params = jax.tree.map(np.asarray, variables['params'])
  np.testing.assert_allclose(
    merge.apply(variables, grid),
    reference_norm(joined, params['norm']) @ params['reduce']['kernel'],
    rtol=1e-4,
    atol=1e-5,
  )


def test_the_pyramid(rng):
  images = jnp.asarray(rng.normal(size=(2, 13, 9, 3)), jnp.float32)
  model = swin.Swin(SMALL)
  variables = made(model, rng, images)
  apply = jax.jit(model.apply)
  levels = apply(variables, images)
  assert [level.shape for level in levels] == [(2, 7, 5, 4), (2, 4, 3, 8)]
  chex.assert_tree_all_finite(levels)
  # Images do not meet in a backbone.
  changed = apply(variables, images.at[1].set(0.0))
  for level, other in zip(levels, changed, strict=True):
    np.testing.assert_array_equal(level[0], other[0])
    assert np.abs(level[1] - other[1]).max() > 0


def test_remat_changes_no_name_value_or_gradient(rng):
  images = jnp.asarray(rng.normal(size=(1, 6, 6, 3)), jnp.float32)
  spec = swin.SwinSpec(4, (2,), (1,), window=2, patch=2, levels=1)
  plain, remat = swin.Swin(spec), swin.Swin(spec, remat=True)
  variables = made(plain, rng, images)
  chex.assert_trees_all_equal_shapes(variables, made(remat, rng, images))

  def total(model):
    return jax.value_and_grad(
      lambda variables: jnp.sum(model.apply(variables, images)[0] ** 3)
    )

  chex.assert_trees_all_close(
    jax.jit(total(plain))(variables),
    jax.jit(total(remat))(variables),
    rtol=1e-4,
    atol=1e-4,
  )
  assert 'remat' in str(jax.make_jaxpr(total(remat))(variables))
  assert 'remat' not in str(jax.make_jaxpr(total(plain))(variables))


def test_injected_keys_stand_where_the_fused_ones_stood(rng):
  calls = []

  def keys(features, *, grid, prefix, name):
    calls.append((features, grid, prefix))
    return nn.Dense(features, name=name)

  grid = jnp.asarray(rng.normal(size=(1, 5, 4, 4)), jnp.float32)
  fused = swin_blocks.SwinBlock(2, 3, True)
  variables = made(fused, rng, grid)
  flat = traverse_util.flatten_dict(variables)
  for name in ('kernel', 'bias'):
    q, k, v = jnp.split(flat.pop(('params', 'attention', 'qkv', name)), 3, -1)
    flat['params', 'attention', 'keys', name] = k
    flat['params', 'attention', 'queries_values', name] = jnp.concatenate(
      [q, v], axis=-1
    )
  np.testing.assert_allclose(
    swin_blocks.SwinBlock(2, 3, True, keys=keys).apply(
      traverse_util.unflatten_dict(flat), grid
    ),
    fused.apply(variables, grid),
    rtol=1e-5,
    atol=1e-5,
  )
  assert calls == [(4, (3, 3), 0)]
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  shapes = jax.eval_shape(
    swin.Swin(SMALL, keys=keys).init, jax.random.key(0), images
  )
  assert 'keys' in shapes['params']['stage_1_0']['attention']


def test_the_attention_function_is_injected(rng):
  def values_only(queries, keys, values, *, mask, bias):
    return values

  grid = jnp.asarray(rng.normal(size=(1, 4, 4, 4)), jnp.float32)
  block = swin_blocks.SwinBlock(2, 2, True, attend=values_only)
  variables = made(block, rng, grid)
  found = block.apply(variables, grid)
  # Every token only looks at itself.
  changed = block.apply(variables, grid.at[0, 1, 2].set(0.0))
  same = np.asarray(found == changed).all(-1)[0]
  assert not same[1, 2]
  assert same.sum() == 15


def test_half_precision_computes_and_returns_but_does_not_keep():
  model = swin.Swin(SMALL, dtype=jnp.bfloat16)
  variables, levels = jax.eval_shape(
    lambda x: model.init_with_output(jax.random.key(0), x)[::-1],
    jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32),
  )
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  assert {x.dtype for x in levels} == {jnp.dtype('bfloat16')}


# 28,288,354, 49,606,258 and 87,768,224 with their classifiers of 1,000 classes.
@pytest.mark.parametrize(
  ('name', 'count'),
  [
    ('swin_tiny', 28_288_354 - 769_000),
    ('swin_small', 49_606_258 - 769_000),
    ('swin_base', 87_768_224 - 1_025_000),
  ],
)
def test_variants_have_the_published_number_of_parameters(name, count):
  spec = swin.VARIANTS[name]
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(swin.Swin(spec).init, jax.random.key(0), images)
  params = dict(shapes['params'])
  # The published model normalises the last stage alone.
  del params['norm_1'], params['norm_2']
  assert sum(x.size for x in jax.tree.leaves(params)) == count


@pytest.mark.parametrize('levels', [1, 4])
def test_names_cover_every_array_once(levels):
  spec = swin.SwinSpec(4, (1, 2, 1, 1), (1, 2, 1, 1), window=2, levels=levels)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = traverse_util.flatten_dict(
    jax.eval_shape(swin.Swin(spec).init, jax.random.key(0), images)
  )
  tensors = list(swin.swin_names(spec))
  assert sorted(tensor.path for tensor in tensors) == sorted(shapes)
  begun = [tensor for tensor in tensors if not tensor.sources]
  assert len(begun) == 2 * (levels - 1)
  for tensor in begun:
    value = tensor.convert()
    assert value.shape == shapes[tensor.path].shape
    assert (value == (tensor.path[-1] == 'scale')).all()


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    (swin.SwinSpec(4, (1, 1), (1,), levels=1), 'one number of blocks'),
    (swin.SwinSpec(4, (1,), (1,), levels=2), r'spec\.levels=2'),
    (swin.SwinSpec(4, (1,), (1,), levels=0), r'spec\.levels=0'),
  ],
)
def test_errors_name_the_sizes(spec, message):
  with pytest.raises(ValueError, match=message):
    swin.Swin(spec).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  with pytest.raises(ValueError, match=message):
    list(swin.swin_names(spec))


def test_heads_must_divide_the_features():
  model = swin.Swin(swin.SwinSpec(4, (1,), (3,), levels=1))
  with pytest.raises(ValueError, match='num_heads=3 must divide features=4'):
    model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
