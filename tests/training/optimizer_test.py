import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msba_jax.data.errors import InputError
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.training.experiment import OptimizerConfig
from msba_jax.training.load import load_experiment
from msba_jax.training.optimizer import (
  decay_mask,
  frozen_mask,
  layer_scales,
  learning_rate,
  make_optimizer,
  scale_by_layer,
)
from tests.training.conftest import SMALL


def test_the_rate_rises_and_falls():
  config = OptimizerConfig(learning_rate=2.0, warmup_steps=4)
  rate = learning_rate(config, steps=12)
  expected = [
    2.0 * min((t + 1) / 4, 1.0) * 0.5 * (1 + np.cos(np.pi * max(t - 4, 0) / 8))
    for t in range(12)
  ]
  np.testing.assert_allclose([rate(t) for t in range(12)], expected, rtol=1e-5)
  assert rate(0) > 0
  assert rate(11) > 0


def test_a_constant_rate_stays():
  config = OptimizerConfig(
    learning_rate=2.0, warmup_steps=2, schedule='constant'
  )
  rate = learning_rate(config, steps=5)
  np.testing.assert_allclose([rate(t) for t in range(5)], [1, 2, 2, 2, 2])


def test_no_warmup():
  config = OptimizerConfig(learning_rate=2.0, warmup_steps=0)
  assert learning_rate(config, steps=5)(0) == 2.0


def test_a_warmup_that_does_not_end_is_refused():
  config = OptimizerConfig(warmup_steps=100)
  with pytest.raises(ValueError, match=r'warmup_steps=100 .* less than steps'):
    make_optimizer(config, steps=100)


def test_only_kernels_and_tables_decay():
  params = {
    'dense': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)},
    'heads': {'kernel': jnp.ones((2, 2, 3)), 'bias': jnp.ones((2, 3))},
    'norm': {'scale': jnp.ones(3), 'bias': jnp.ones(3)},
    'power': jnp.ones(()),
    'table': {'embedding': jnp.ones((5, 3))},
  }
  assert decay_mask(params) == {
    'dense': {'kernel': True, 'bias': False},
    'heads': {'kernel': True, 'bias': False},
    'norm': {'scale': False, 'bias': False},
    'power': False,
    'table': {'embedding': True},
  }


def test_without_a_gradient_only_decay_moves():
  config = OptimizerConfig(
    learning_rate=0.1, warmup_steps=0, schedule='constant', weight_decay=0.5
  )
  params = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}
  optimizer = make_optimizer(config, steps=10)
  updates, _ = optimizer.update(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
  )
  moved = optax.apply_updates(params, updates)
  np.testing.assert_allclose(moved['kernel'], 1 - 0.1 * 0.5, rtol=1e-6)
  np.testing.assert_array_equal(moved['bias'], 1.0)


def test_a_huge_gradient_is_clipped():
  config = OptimizerConfig(clip_norm=1.0, warmup_steps=0)
  params = {'kernel': jnp.zeros((2, 2))}
  optimizer = make_optimizer(config, steps=10)
  small = optimizer.init(params)
  gradient = {'kernel': jnp.full((2, 2), 0.5)}  # of norm 1
  huge = {'kernel': jnp.full((2, 2), 5e8)}
  _, after_small = optimizer.update(gradient, small, params)
  _, after_huge = optimizer.update(huge, small, params)
  for a, b in zip(
    jax.tree.leaves(after_small), jax.tree.leaves(after_huge), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def _tree(rng, *paths, shape=(2, 3)):
  """Random parameters at paths such as `backbone/stem/kernel`."""
  tree = {}
  for path in paths:
    *outer, last = path.split('/')
    node = tree
    for name in outer:
      node = node.setdefault(name, {})
    node[last] = jnp.asarray(rng.normal(size=shape), jnp.float32)
  return tree


def _by_path(tree):
  paths, _ = jax.tree.flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in paths
  }


@pytest.mark.parametrize(
  'layers',
  [
    {
      'backbone/patch/kernel': 0,
      'backbone/position': 0,
      'backbone/prefix': 0,
      'backbone/norm_before/scale': 0,
      'backbone/block_0/attention/position/bias': 1,
      'backbone/block_2/norm/scale': 2,
      'backbone/block_10/norm/scale': 3,  # in order, whatever is left out
      'backbone/norm/scale': 4,
      'head/block_0/kernel': 4,
      'power': 4,
    },
    {
      'backbone/stem_0/kernel': 0,
      'backbone/norm_patch/scale': 0,
      'backbone/stage_0_0/kernel': 1,
      'backbone/stage_0_1/kernel': 2,
      'backbone/merge_1/norm/scale': 3,
      'backbone/stage_1_0/kernel': 3,
      'backbone/stage_10_0/kernel': 4,
      'backbone/norm_1/scale': 5,
    },
    {
      'backbone/stem/kernel': 0,
      'backbone/stage_0/block_0/kernel': 1,
      'backbone/stage_0/block_1/kernel': 2,
      'backbone/stage_1/shortcut/kernel': 3,
      'backbone/stage_1/block_0/kernel': 3,
      'backbone/norm/scale': 4,
    },
    {
      'backbone/backbone/patch/kernel': 0,
      'backbone/backbone/block_0/kernel': 1,
      'backbone/backbone/norm/scale': 2,
      'backbone/fuse/kernel': 2,
    },
  ],
)
def test_the_rate_decays_from_layer_to_layer(rng, layers):
  scales = _by_path(layer_scales(_tree(rng, *layers), 0.7))
  depth = max(layers.values())
  expected = {path: 0.7 ** (depth - layer) for path, layer in layers.items()}
  assert scales == pytest.approx(expected)


def test_the_layers_of_a_convolutional_net():
  model = ConvNet(ConvSpec((4, 4), (2, 1), levels=2))
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
  scales = layer_scales({'backbone': shapes}, 0.5)['backbone']
  found = {name: set(_by_path(part).values()) for name, part in scales.items()}
  assert found == {
    'stem': {0.0625},
    'stage_0_0': {0.125},
    'stage_0_1': {0.25},
    'stage_1_0': {0.5},
    'norm_0': {1.0},
    'norm_1': {1.0},
  }


@pytest.mark.parametrize('stage', ['', 'stage_0/'])
def test_stacked_blocks_have_the_rates_of_single_ones(rng, variant, stage):
  blocks = [f'backbone/{stage}block_{i}/kernel' for i in range(3)]
  single = _tree(rng, 'backbone/stem/kernel', *blocks, 'head/kernel')
  scaled = _by_path(variant(_scaled)(single))
  values = _by_path(single)
  stacked = _tree(rng, 'backbone/stem/kernel', f'backbone/{stage}blocks/kernel')
  stacked['backbone']['stem'] = single['backbone']['stem']
  outer = stacked['backbone']['stage_0'] if stage else stacked['backbone']
  outer['blocks']['kernel'] = jnp.stack([values[name] for name in blocks])
  found = _by_path(variant(_scaled)(stacked))
  np.testing.assert_array_equal(
    found[f'backbone/{stage}blocks/kernel'],
    jnp.stack([scaled[name] for name in blocks]),
  )
  stem = 'backbone/stem/kernel'
  np.testing.assert_array_equal(found[stem], scaled[stem])
  np.testing.assert_allclose(scaled[stem], 0.7**4 * values[stem], rtol=1e-6)


def _scaled(updates):
  optimizer = scale_by_layer(0.7)
  return optimizer.update(updates, optimizer.init(updates))[0]


def test_scaled_updates_keep_their_dtype(rng):
  updates = _tree(rng, 'backbone/block_0/kernel', 'backbone/blocks/kernel')
  half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), updates)
  assert {leaf.dtype for leaf in jax.tree.leaves(_scaled(half))} == {
    jnp.dtype(jnp.bfloat16)
  }


def test_layer_decay_scales_what_the_optimiser_does(rng):
  params = _tree(rng, 'backbone/block_0/kernel', 'head/kernel')
  gradients = jax.tree.map(jnp.sin, params)
  same, decayed = (
    _update(OptimizerConfig(layer_decay=decay), gradients, params)
    for decay in (1.0, 0.5)
  )
  expected = {
    **same,
    'backbone': jax.tree.map(lambda x: x / 2, same['backbone']),
  }
  chex.assert_trees_all_close(decayed, expected, rtol=1e-6)


def _update(config, gradients, params):
  optimizer = make_optimizer(config, steps=1000)
  return optimizer.update(gradients, optimizer.init(params), params)[0]


def test_layer_decay_without_blocks_is_refused(rng):
  optimizer = make_optimizer(OptimizerConfig(layer_decay=0.5), steps=1000)
  params = _tree(rng, 'backbone/stem/kernel', 'head/kernel')
  said = r'layer_decay=0\.5 needs a backbone with blocks .* has backbone, head'
  with pytest.raises(InputError, match=said):
    optimizer.init(params)
  assert set(_by_path(layer_scales(params, 1.0)).values()) == {1.0}


@pytest.mark.parametrize('decay', [0.0, -1.0, 1.5, float('nan')])
def test_an_impossible_layer_decay_is_refused(decay):
  with pytest.raises(ValueError, match=r'layer_decay=.* must be in \(0, 1\]'):
    OptimizerConfig(layer_decay=decay)


BLOCKS = [f'backbone/block_{i}/kernel' for i in (0, 1, 2, 10)]


@pytest.mark.parametrize(
  ('pattern', 'frozen'),
  [
    ('backbone/*', {'backbone/stem/kernel', *BLOCKS}),
    ('backbone/block_[0-1]/*', set(BLOCKS[:2])),
    ('*/stem/kernel', {'backbone/stem/kernel'}),
    ('power', {'power'}),
  ],
)
def test_patterns_freeze_what_they_match(rng, pattern, frozen):
  params = _tree(rng, 'backbone/stem/kernel', *BLOCKS, 'head/kernel', 'power')
  mask = _by_path(frozen_mask(params, (pattern,)))
  assert {name for name, stays in mask.items() if stays} == frozen
  assert not any(_by_path(frozen_mask(params, ())).values())


@pytest.mark.parametrize(
  ('patterns', 'said'),
  [
    (('backbone',), r"'backbone' matches no parameter; .* has backbone, head:"),
    (('head/*', 'Head/*'), r"freeze 'Head/\*' matches no parameter"),
    (('',), "freeze '' matches no parameter"),
    (('head/*', 'backbone/*'), r'freeze head/\* backbone/\* leaves nothing'),
  ],
)
def test_patterns_that_do_not_fit_are_refused(rng, patterns, said):
  params = _tree(rng, 'backbone/stem/kernel', 'head/kernel')
  with pytest.raises(InputError, match=said):
    make_optimizer(OptimizerConfig(freeze=patterns), steps=1000).init(params)


def test_what_is_frozen_has_no_update_and_no_state(rng):
  params = _tree(rng, 'backbone/block_0/kernel', 'head/kernel')
  gradients = {
    'backbone': jax.tree.map(lambda x: 1e6 + x, params['backbone']),
    'head': jax.tree.map(jnp.sin, params['head']),
  }
  config = OptimizerConfig(
    weight_decay=0.5, freeze=('backbone/*',), layer_decay=0.5
  )
  updates = _update(config, gradients, params)
  np.testing.assert_array_equal(updates['backbone']['block_0']['kernel'], 0)
  # The head moves as if it were alone: the huge gradients are not clipped by.
  alone = _update(
    OptimizerConfig(weight_decay=0.5),
    {'head': gradients['head']},
    {'head': params['head']},
  )
  chex.assert_trees_all_close(updates['head'], alone['head'], rtol=1e-6)
  state = make_optimizer(config, steps=1000).init(params)
  moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
  assert [leaf.shape for leaf in moments] == [(2, 3)] * 2


def test_the_command_line_says_what_is_frozen():
  words = ['--optimizer.freeze', 'backbone/*', 'embed/*']
  config = load_experiment(
    SMALL, [*words, '--optimizer.layer-decay', '0.75']
  ).optimizer
  assert config.freeze == ('backbone/*', 'embed/*')
  assert config.layer_decay == 0.75
  assert load_experiment(SMALL).optimizer.freeze == ()
  with pytest.raises(InputError, match='layer_decay=0'):
    load_experiment(SMALL, ['--optimizer.layer-decay', '0'])
