import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.losses.term import LossTerm
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.context import MemoryBank, solo
from msba_jax.models.msba import msba
from msba_jax.retrieval.devices import data_mesh, replicated
from msba_jax.training.checkpoint import Checkpoints
from msba_jax.training.errors import TrainingStopped
from msba_jax.training.experiment import ContextDropout
from msba_jax.training.load import load_experiment
from msba_jax.training.loop import train
from msba_jax.training.mesh import global_batch, host_copy, padded_size
from msba_jax.training.optimizer import make_optimizer
from msba_jax.training.state import create_state, parameter_count
from msba_jax.training.step import (
  BATCH,
  MEMORY,
  SOLO,
  compile_step,
  draw_context,
  make_step,
  prepare_images,
  seen_context,
)
from tests.training.conftest import SMALL
from tests.training.small_experiment import Tiny

SIZE = 8  # images of a batch of the small experiment


class Running(Tiny):
  """Batch normalisation of the channels with running statistics."""

  def setup(self):
    super().setup()
    self.norm = nn.BatchNorm(momentum=0.9, use_bias=False, use_scale=False)

  def __call__(self, images, *, context=solo, train=False):
    images = self.norm(images, use_running_average=not train)
    return self.refine(super().encode(images), context=context)

  def encode(self, images):
    return super().encode(self.norm(images, use_running_average=True))


def _batch(seed, size=SIZE):
  """A batch, filled up to `size` by images that are not valid."""
  rng = np.random.default_rng(seed)
  rows = np.resize(np.arange(SIZE), size)
  image = rng.integers(0, 256, (SIZE, 16, 16, 3), dtype=np.uint8)
  return {
    'image': image[rows],
    'label': (rows // 2).astype(np.int32),
    'index': rows.astype(np.int32),
    'valid': np.arange(size) < SIZE,
  }


def _start(experiment):
  optimizer = make_optimizer(experiment.optimizer, steps=experiment.steps)
  images = np.zeros((1, 16, 16, 3), np.float32)
  return optimizer, create_state(experiment, optimizer, images)


def _run(experiment, *, devices, steps, wrap=lambda step: step, start=None):
  """States and metrics of some steps, on the host."""
  mesh = data_mesh(jax.devices()[:devices])
  optimizer, state = start or _start(experiment)
  step = compile_step(wrap(make_step(experiment, optimizer)), mesh)
  state = jax.device_put(host_copy(state), replicated(mesh))
  size = padded_size(mesh, SIZE)
  seen = []
  for i in range(steps):
    batch = global_batch(mesh, _batch(i, size), size=size)
    state, metrics = step(state, batch)
    seen.append(host_copy((state, metrics)))
  return seen


@pytest.fixture(scope='module')
def start(small):
  return _start(small())


@pytest.fixture(scope='module')
def one_device(small, start):
  return _run(small(), devices=1, steps=3, start=start)


@pytest.mark.parametrize('devices', [2, 3, 4, 8])
def test_the_same_numbers_on_any_number_of_devices(
  small, start, one_device, devices
):
  for (state, metrics), (expected, expected_metrics) in zip(
    _run(small(), devices=devices, steps=3, start=start),
    one_device,
    strict=True,
  ):
    # Adam divides by the root of tiny squares: gradients agree far better.
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
      state.params, expected.params, rtol=1e-5, atol=1e-5
    )
    chex.assert_trees_all_close(
      state.memory, expected.memory, rtol=1e-5, atol=1e-5
    )


def test_the_step_is_traced_once_for_all_contexts(small):
  chex.clear_trace_counter()
  dropout = ContextDropout(solo=0.3, memory=0.3)
  wrap = functools.partial(chex.assert_max_traces, n=1)
  seen = _run(small(context_dropout=dropout), devices=2, steps=8, wrap=wrap)
  assert [int(metrics['step']) for _, metrics in seen] == list(range(8))
  kinds = {_kind(step, dropout) for step in range(8)}
  assert kinds == {SOLO, MEMORY, BATCH}


def _kind(step, dropout):
  key = jax.random.fold_in(jax.random.key(0), step)
  return int(draw_context(jax.random.split(key, 3)[1], dropout, memory=True))


def test_the_state_is_donated(small):
  mesh = data_mesh()
  optimizer, state = _start(small())
  step = compile_step(make_step(small(), optimizer), mesh)
  state = jax.device_put(state, replicated(mesh))
  after, _ = step(state, global_batch(mesh, _batch(0), size=SIZE))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.ema))
  assert int(after.step) == 1


def test_parameters_average_and_memory_move(start, one_device):
  _, before = start
  (first, _), (second, _), _ = one_device
  for leaf, moved, ema in zip(
    jax.tree.leaves(before.params),
    jax.tree.leaves(first.params),
    jax.tree.leaves(first.ema),
    strict=True,
  ):
    assert not np.array_equal(leaf, moved)
    np.testing.assert_allclose(
      ema, 0.1 * leaf + 0.9 * moved, rtol=1e-4, atol=1e-6
    )  # min(0.9, 1 / 10)
  np.testing.assert_array_equal(first.memory.valid, [True] * 4 + [False] * 2)
  assert not np.array_equal(first.memory.regions, second.memory.regions)
  np.testing.assert_array_equal(second.memory.regions[:, 4:], 0)


def test_an_infinite_loss_changes_nothing_and_stays(small):
  losses = (
    *small().losses,
    LossTerm('trap', 1.0, lambda out, batch: _trap(batch)),
  )
  experiment = small(losses=losses, model=Running())
  seen = _run(experiment, devices=1, steps=4)
  states, metrics = zip(*seen, strict=True)
  assert [bool(m['finite']) for m in metrics] == [True, False, False, False]
  assert [int(s.step) for s in states] == [1, 1, 1, 1]
  for state in states[1:]:
    chex.assert_trees_all_equal(
      state.replace(finite=states[0].finite), states[0]
    )


def _trap(batch):
  """Not finite for the batch of seed 1 alone."""
  mark = int(_batch(1)['image'][0, 0, 0, 0])
  return jnp.where(batch['image'][0, 0, 0, 0] == mark, jnp.inf, 0.0)


@pytest.mark.parametrize('memory', [False, True])
def test_contexts_are_drawn_as_often_as_they_should(memory):
  keys = jax.random.split(jax.random.key(0), 4000)
  draw = functools.partial(
    draw_context, dropout=ContextDropout(), memory=memory
  )
  counts = np.bincount(jax.vmap(draw)(keys), minlength=3) / 4000
  expected = [0.2, 0.3, 0.5] if memory else [0.2, 0.0, 0.8]
  np.testing.assert_allclose(counts, expected, atol=0.03)


def test_what_is_not_drawn_has_no_influence(small, rng):
  experiment = small()
  images = jnp.asarray(rng.normal(size=(4, 16, 16, 3)), jnp.float32)
  variables = experiment.model.init(jax.random.key(0), images)
  regions = jnp.asarray(rng.normal(size=(1, 3, 1, 8)), jnp.float32)
  memory = MemoryBank(regions, jnp.array([True, True, False]))
  valid = jnp.array([True, True, True, False])

  def embed(context):
    return experiment.model.apply(variables, images, context=context)[0]

  solo_vectors = embed(solo)
  by_kind = {
    kind: embed(seen_context(jnp.int32(kind), valid, memory))
    for kind in (SOLO, MEMORY, BATCH)
  }
  np.testing.assert_array_equal(by_kind[SOLO], solo_vectors)
  np.testing.assert_allclose(
    by_kind[MEMORY], embed(memory.context()), atol=1e-6
  )
  assert not np.allclose(by_kind[BATCH], by_kind[MEMORY], atol=1e-3)
  np.testing.assert_allclose(
    by_kind[BATCH],
    embed(seen_context(jnp.int32(BATCH), valid, None)),
    atol=1e-6,
  )


def test_an_image_is_augmented_by_its_place_alone(small, rng):
  experiment = small()
  images = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
  key = jax.random.key(1)
  prepared = prepare_images(jnp.asarray(images), key, experiment)
  assert prepared.dtype == jnp.float32
  fewer = prepare_images(jnp.asarray(images[:2]), key, experiment)
  np.testing.assert_allclose(fewer, prepared[:2], atol=1e-6)
  one = experiment.augment(jax.random.fold_in(key, 3), jnp.asarray(images[3]))
  expected = (np.asarray(one) / 255 - 0.5) / 0.25
  np.testing.assert_allclose(prepared[3], expected, atol=1e-5)


def test_features_reach_the_model_untouched(small, rng):
  features = {
    'fine': jnp.asarray(rng.normal(size=(4, 3, 2)), jnp.float32),
    'coarse': (jnp.asarray(rng.normal(size=(4, 1, 2)), jnp.bfloat16),),
  }
  prepared = prepare_images(features, jax.random.key(0), small(augment=None))
  chex.assert_trees_all_equal(prepared, features)


def test_parameters_are_counted():
  tree = {'a': np.zeros((2, 3)), 'b': jax.ShapeDtypeStruct((), np.float32)}
  assert parameter_count(tree) == 7


def _frozen(small, *patterns):
  return small(
    optimizer=dataclasses.replace(small().optimizer, freeze=patterns)
  )


def test_frozen_parameters_stay_as_they_are_to_the_bit(
  small, one_device, tmp_path
):
  experiment = _frozen(small, 'project/*', 'embed/bias')
  optimizer, state = _start(experiment)
  state.params['project']['bias'] = state.ema['project']['bias'] = -jnp.zeros(8)
  before = host_copy(state.params)
  seen = _run(experiment, devices=1, steps=3, start=(optimizer, state))
  for after, _ in seen:
    for params in (after.params, after.ema):
      for name in ('kernel', 'bias'):
        _assert_same_bits(params['project'][name], before['project'][name])
      _assert_same_bits(params['embed']['bias'], before['embed']['bias'])
      moved = params['embed']['kernel'] - before['embed']['kernel']
      assert np.abs(moved).max() > 1e-4
  # The gradients of what is trained are those of the whole training.
  (_, metrics), (_, whole) = seen[0], one_device[0]
  np.testing.assert_allclose(metrics['loss'], whole['loss'], rtol=1e-5)
  assert metrics['gradient_norm'] < 0.99 * whole['gradient_norm']
  mu = seen[0][0].opt_state.inner_states['trained'].inner_state[1][0].mu
  assert [leaf.shape for leaf in jax.tree.leaves(mu)] == [(8, 8), (8, 8)]
  np.testing.assert_allclose(
    np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(mu))),
    0.1 * min(1.0, metrics['gradient_norm']),  # clipped at norm 1
    rtol=1e-4,
  )

  last, _ = seen[-1]
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, last)
    _, target = _start(experiment)
    chex.assert_trees_all_equal(checkpoints.restore(target), last)


def _assert_same_bits(found, expected):
  assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def test_no_gradient_of_the_frozen_is_computed(small):
  experiment = _frozen(small, 'project/*')
  assert _products(small()) > _products(experiment)


def _products(experiment):
  """Matrix products in the program of a step."""
  optimizer, state = _start(experiment)
  step = jax.jit(make_step(experiment, optimizer))
  return step.lower(state, _batch(0)).as_text().count('dot_general')


class Sowing(Tiny):
  """A penalty on the regions, sowed in two pieces."""

  weight: float = 1.0

  def refine(self, regions, *, context=solo):
    self.sow('penalties', 'size', self.weight * jnp.mean(regions**2))
    self.sow('penalties', 'stacked', self.weight * jnp.ones(3))
    return super().refine(regions, context=context)


def test_what_modules_sow_is_added_to_the_loss(small, start, one_device):
  (before, metrics), (after, _) = _run(
    small(model=Sowing(weight=0.5)), devices=2, steps=2, start=start
  )
  (plain, plain_metrics), *_ = one_device
  assert 'penalty' not in plain_metrics
  np.testing.assert_allclose(
    metrics['loss'] - plain_metrics['loss'], metrics['penalty'], rtol=1e-4
  )
  images = prepare_images(_batch(0)['image'], _keys(0)[0], small())
  regions = small().model.apply(
    {'params': start[1].params}, images, method='encode'
  )
  expected = 0.5 * np.mean(np.square(regions)) + 1.5
  np.testing.assert_allclose(metrics['penalty'], expected, rtol=1e-4)
  assert not np.array_equal(
    before.params['project']['kernel'], plain.params['project']['kernel']
  )
  assert int(after.step) == 2


def _keys(step):
  """Keys of augmentation, context and dropout."""
  return jax.random.split(jax.random.fold_in(jax.random.key(0), step), 3)


def test_running_statistics_are_part_of_the_state(small):
  experiment = small(model=Running(), augment=None)
  optimizer, state = _start(experiment)
  assert set(state.statistics) == {'batch_stats'}
  assert 'norm' not in state.params
  seen = _run(experiment, devices=4, steps=2, start=(optimizer, state))
  mean = np.zeros(3)
  for step, (after, _) in enumerate(seen):
    pixels = (_batch(step)['image'].astype(np.float64) / 255 - 0.5) / 0.25
    mean = 0.9 * mean + 0.1 * pixels.mean((0, 1, 2))
    found = after.statistics['batch_stats']['norm']['mean']
    np.testing.assert_allclose(found, mean, rtol=1e-4, atol=1e-6)


def test_a_run_keeps_what_is_frozen_and_the_statistics(tmp_path):
  words = ['--optimizer.freeze', 'project/*', '--steps', '3']
  experiment = dataclasses.replace(
    load_experiment(SMALL, [*words, '--evaluate-every', '3']), model=Running()
  )
  options = {'devices': jax.devices()[:1], 'progress': False}
  with pytest.raises(TrainingStopped):
    train(experiment, tmp_path, until=2, **options)
  run = train(experiment, tmp_path, **options)
  _, start = _start(experiment)
  for name in ('kernel', 'bias'):
    _assert_same_bits(
      run.params['project'][name], start.params['project'][name]
    )
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    saved = checkpoints.restore(start)
  chex.assert_trees_all_equal(run.statistics, saved.statistics)
  assert np.all(run.statistics['batch_stats']['norm']['mean'] != 0)

  images = experiment.data.open().validation.queries[0]['image'][None]
  vectors, _ = run.embedder.compiled(
    run.embedder.variables, images, solo, keep_regions=False
  )
  pixels = (images.astype(np.float32) / 255 - 0.5) / 0.25
  expected, _ = experiment.model.apply(
    {'params': saved.ema, **saved.statistics}, pixels
  )
  np.testing.assert_allclose(vectors, expected, atol=1e-5)
  changed = jax.tree.map(lambda leaf: leaf + 0.5, run.statistics)
  other = run.embedder.with_params(run.params, changed)
  assert other.fingerprint != run.fingerprint


@pytest.mark.slow
def test_msba_takes_the_same_step_on_any_number_of_devices(small):
  experiment = small(
    model=msba(
      ConvNet(ConvSpec((8,), (1,), levels=1)),
      features=8,
      embedding=8,
      num_heads=2,
    ),
    context_dropout=ContextDropout(solo=0.0, memory=0.0),
  )
  start = _start(experiment)
  (one, metrics), (four, others) = (
    _run(experiment, devices=devices, steps=1, start=start)[0]
    for devices in (1, 4)
  )
  chex.assert_trees_all_close(metrics, others, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(one.memory, four.memory, rtol=1e-5, atol=1e-5)
  mean_of_gradients = [s.opt_state[1][0].mu for s in (one, four)]
  chex.assert_trees_all_close(*mean_of_gradients, rtol=1e-5, atol=1e-5)
