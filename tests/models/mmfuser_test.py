"""Tests of MMFuser and of the backbone around a fusion."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models import fusion_baselines, mmfuser
from msba_jax.models.msba import msba
from tests.layers.deformable_test import reference as deformable_reference

GRID = 2, 3


def draw(rng, n=2, tokens=6, d=8, count=3):
  """Layers; those of small numbers show the epsilon of the norms."""
  layers = rng.normal(size=(count, n, tokens, d)) * 0.02
  layers[-1] *= 20
  return [jnp.asarray(x, jnp.float32) for x in layers]


def refilled(module, layers, rng):
  """Parameters none of which is a special value."""
  shapes = jax.eval_shape(
    lambda: module.init(jax.random.key(0), layers, grid=GRID)
  )
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, jnp.float32), shapes
  )


def applied(module):
  return jax.jit(lambda params, layers: module.apply(params, layers, grid=GRID))


def as_double(variables):
  return jax.tree.map(
    lambda x: np.asarray(x, np.float64), variables.get('params', {})
  )


def dense(inputs, params):
  return inputs @ params['kernel'] + params['bias']


def norm(inputs, params):
  centred = inputs - inputs.mean(-1, keepdims=True)
  variance = np.mean(centred**2, axis=-1, keepdims=True)
  return centred / np.sqrt(variance + 1e-6) * params['scale'] + params['bias']


def softmax(scores):
  scores = np.exp(scores - scores.max(-1, keepdims=True))
  return scores / scores.sum(-1, keepdims=True)


def deformable(queries, values, params, heads=2, points=2):
  n, t, d = queries.shape
  shape = n, t, heads, len(values), points
  offsets = dense(queries, params['offsets']).reshape(*shape, 2)
  weights = dense(queries, params['weights']).reshape(n, t, heads, -1)
  centres = np.array(
    [
      ((j + 0.5) / GRID[1], (i + 0.5) / GRID[0])
      for i in range(GRID[0])
      for j in range(GRID[1])
    ]
  ).reshape(1, t, 1, 1, 1, 2)
  read = deformable_reference(
    [
      dense(x, params['values']).reshape(n, *GRID, heads, d // heads)
      for x in values
    ],
    centres + offsets / np.array(GRID[::-1]),
    softmax(weights).reshape(shape),
  )
  return dense(read.reshape(n, t, d), params['out'])


def plain(queries, values, params, heads=2):
  n, t, d = queries.shape
  keys, values = np.split(
    dense(np.concatenate(values, axis=1), params['keys_values']), 2, axis=-1
  )
  queries, keys, values = (
    x.reshape(n, -1, heads, d // heads)
    for x in (dense(queries, params['queries']), keys, values)
  )
  scores = np.einsum('nqhd,nkhd->nhqk', queries, keys) / np.sqrt(d // heads)
  read = np.einsum('nhqk,nkhd->nqhd', softmax(scores), values)
  return dense(read.reshape(n, t, d), params['out'])


def reference(layers, params, attention):
  attend = {'deformable': deformable, 'softmax': plain}[attention]
  *shallow, deep = (np.asarray(x, np.float64) for x in layers)
  fused = attend(
    norm(deep, params['norm_deep']),
    [norm(x, params['norm_shallow']) for x in shallow],
    params['cross'],
  )
  if 'self' in params:
    normed = norm(fused, params['norm_self'])
    inner = attend(normed, [normed], params['self'])
    fused = fused + params['scale_self'] * inner
  return deep + params['scale'] * fused


@pytest.mark.parametrize('self_attention', [True, False])
@pytest.mark.parametrize('attention', ['deformable', 'softmax'])
def test_equals_the_reference_and_uses_every_parameter(
  rng, attention, self_attention
):
  module = mmfuser.MMFuser(2, 2, attention, self_attention)
  layers = draw(rng)
  variables = refilled(module, layers, rng)

  @jax.jit
  def evaluate(variables, layers):
    def total(variables, layers):
      fused = module.apply(variables, layers, grid=GRID)
      return jnp.sum(fused**3), fused

    return jax.grad(total, (0, 1), has_aux=True)(variables, layers)

  gradients, fused = evaluate(variables, layers)
  params = as_double(variables)
  assert ('self' in params) == self_attention
  np.testing.assert_allclose(
    fused, reference(layers, params, attention), rtol=1e-4, atol=1e-4
  )
  chex.assert_tree_all_finite(gradients)
  for path, gradient in jax.tree.leaves_with_path(gradients):
    assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize('attention', ['deformable', 'softmax'])
def test_at_first_it_is_the_deep_layer_exactly(rng, attention):
  module = mmfuser.MMFuser(2, 2, attention)
  layers = [x.astype(jnp.bfloat16) for x in draw(rng)]
  variables = jax.jit(lambda: module.init(jax.random.key(0), layers, grid=GRID))
  fused = applied(module)(variables(), layers)
  assert fused.dtype == jnp.bfloat16
  np.testing.assert_array_equal(fused, layers[-1])


def test_factors_may_begin_elsewhere(rng):
  layers = draw(rng)
  module = mmfuser.MMFuser(2, 2, scale=0.5)
  variables = jax.jit(lambda: module.init(jax.random.key(0), layers, grid=GRID))
  params = variables()['params']
  for name in ('scale', 'scale_self'):
    np.testing.assert_array_equal(params[name], np.full(8, 0.5))
  np.testing.assert_allclose(
    applied(module)(variables(), layers),
    reference(layers, as_double(variables()), 'deformable'),
    rtol=1e-4,
    atol=1e-4,
  )


def test_at_first_every_head_reads_in_its_own_direction(rng):
  module = mmfuser.DeformableAttention(num_heads=4, num_points=1)
  layers = draw(rng, n=1, tokens=9, count=1)
  variables = jax.jit(
    lambda: module.init(jax.random.key(0), *given, grid=(3, 3))
  )
  given = layers[0], layers
  params = variables()['params']
  eye = {'kernel': jnp.eye(8), 'bias': jnp.zeros(8)}
  read = module.apply(
    {'params': {**params, 'values': eye, 'out': eye}}, *given, grid=(3, 3)
  )
  # From the middle, token 4: right, down, left, up.
  parts = layers[0].reshape(9, 4, 2)
  for head, token in enumerate((5, 7, 3, 1)):
    np.testing.assert_allclose(
      read.reshape(9, 4, 2)[4, head], parts[token, head], atol=1e-6
    )


def test_the_number_of_parameters_is_the_published_one():
  layers = [jax.ShapeDtypeStruct((1, 4, 1024), jnp.float32)] * 5
  params = jax.eval_shape(mmfuser.MMFuser().init, jax.random.key(0), layers)
  counts = {
    name: sum(x.size for x in jax.tree.leaves(part))
    for name, part in params['params'].items()
  }
  norms = sum(counts[f'norm_{name}'] for name in ('deep', 'shallow', 'self'))
  assert counts['cross'] == 2_886_400
  assert counts['self'] == 2_296_000
  assert norms == 6_144
  assert counts['scale'] + counts['scale_self'] == 2_048
  assert sum(counts.values()) == 5_190_592


class Stages(nn.Module):
  """A stand-in for a backbone: a 1 × 1 convolution for every width."""

  widths: tuple[int, ...] = (4, 4, 4)

  @nn.compact
  def __call__(self, images, *, train=False):
    return tuple(
      nn.Dense(width, name=f'stage_{i}')(images) + train
      for i, width in enumerate(self.widths)
    )


@pytest.mark.parametrize('keep_levels', [False, True])
def test_a_fused_backbone_gives_the_fused_grid(rng, keep_levels):
  images = jnp.asarray(rng.normal(size=(2, *GRID, 3)), jnp.float32)
  fuser = fusion_baselines.WeightedFuser()
  model = mmfuser.FusedBackbone(Stages(), fuser, keep_levels)
  variables = model.init(jax.random.key(0), images)
  levels = Stages().apply(
    {'params': variables['params']['backbone']}, images, train=True
  )
  found = model.apply(variables, images, train=True)
  assert len(found) == (3 if keep_levels else 1)
  np.testing.assert_allclose(found[-1], sum(levels) / 3, rtol=1e-5)
  if keep_levels:
    chex.assert_trees_all_close(found[:-1], levels[:-1], rtol=1e-6)


@pytest.mark.parametrize('keep_levels', [False, True])
def test_msba_takes_a_fused_backbone(keep_levels):
  backbone = mmfuser.FusedBackbone(Stages(), mmfuser.MMFuser(2), keep_levels)
  model = msba(backbone, features=8, embedding=6, num_heads=2)
  images = jax.ShapeDtypeStruct((2, *GRID, 3), jnp.float32)
  embeddings, out = jax.eval_shape(
    lambda key, images: model.init_with_output(key, images)[0],
    jax.random.key(0),
    images,
  )
  assert embeddings.shape == (2, 6)
  assert out['regions'].shape == (3 if keep_levels else 1, 2, 14, 8)


@pytest.mark.usefixtures('unchecked')
def test_errors(rng):
  layers, key = draw(rng), jax.random.key(0)
  with pytest.raises(ValueError, match='at least one shallow layer'):
    mmfuser.MMFuser(2).init(key, layers[:1], grid=GRID)
  with pytest.raises(ValueError, match="attention='linear' must be one of"):
    mmfuser.MMFuser(2, attention='linear').init(key, layers, grid=GRID)
  with pytest.raises(ValueError, match='num_heads=3 must divide features=8'):
    mmfuser.MMFuser(3).init(key, layers, grid=GRID)
  model = mmfuser.FusedBackbone(Stages((4, 6)), fusion_baselines.SumFuser())
  with pytest.raises(ValueError, match='of one size and width'):
    model.init(key, jnp.zeros((2, *GRID, 3)))
