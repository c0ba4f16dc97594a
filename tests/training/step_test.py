import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.losses.term import LossTerm
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.context import MemoryBank, solo
from msba_jax.models.msba import msba
from msba_jax.retrieval.devices import data_mesh, replicated
from msba_jax.training.experiment import ContextDropout
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

SIZE = 8  # images of a batch of the small experiment


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
  seen = _run(small(losses=losses), devices=1, steps=4)
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
