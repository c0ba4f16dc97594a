"""Tests of `msba_jax.losses.sharded`: many devices against one."""

import functools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from msba_jax import losses
from msba_jax.losses import sharded

N, E = 40, 6
LOSSES = ['supervised_contrastive', 'nt_xent']
WAYS = ['alone', 'shard_map', 'unchecked', 'pmap']


def over_devices(function, way, devices):
  """A function of one shard, as a function of the whole batch.

  Sharded are all arguments but the last.
  """
  if way == 'alone':
    return function
  if way == 'pmap':
    mapped = jax.pmap(
      function,
      axis_name='d',
      in_axes=(0, 0, 0, None),
      devices=jax.devices()[:devices],
    )

    def whole(*arrays):
      *arrays, last = arrays
      arrays = [x.reshape(devices, -1, *x.shape[1:]) for x in arrays]
      out = mapped(*arrays, last)
      return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    return whole
  shards = PartitionSpec('d')
  return jax.shard_map(
    function,
    mesh=jax.make_mesh(
      (devices,),
      ('d',),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=jax.devices()[:devices],
    ),
    in_specs=(shards, shards, shards, PartitionSpec()),
    out_specs=shards,
    check_vma=way == 'shard_map',
  )


def ring(name, axis_name, chunk):
  """Losses and numbers of positives as a function of one shard."""

  def shard(x, y, valid, temperature):
    options = {'axis_name': axis_name, 'chunk': chunk, 'valid': valid}
    options['temperature'] = temperature
    if name == 'nt_xent':
      return tuple(sharded.ring_nt_xent(x, y, **options))
    return (sharded.ring_supervised_contrastive(x, y, **options),)

  return shard


def single(name):
  """The same of one device, with an array of all pairs."""

  def whole(x, y, valid, temperature):
    options = {'valid': valid, 'temperature': temperature}
    if name == 'nt_xent':
      positive = losses.positive_pairs(y, valid=valid)
      return losses.nt_xent(x, y, **options).sum(1), positive.sum(1)
    return (losses.supervised_contrastive(x, y, **options),)

  return whole


def with_gradients(function):
  """Results, and gradients of a weighted sum of the losses.

  By the embeddings, and by the logarithm of the temperature for one image: in
  a sum over images of what is divided by the temperature, the rounding grows
  with both.
  """

  def total(x, y, valid, temperature):
    out = function(x, y, valid, temperature)
    weights = 1 + jnp.cos(jnp.arange(len(y), dtype=jnp.float32))
    return (weights * out[0]).sum(), out

  gradient = jax.value_and_grad(total, argnums=(0, 3), has_aux=True)

  def both(*arrays):
    (_, out), (by_embeddings, by_temperature) = gradient(*arrays)
    return out, (by_embeddings, by_temperature * arrays[-1] / len(arrays[0]))

  return both


@functools.cache
def compiled(name, way, devices, chunk):
  axis_name = None if way == 'alone' else 'd'
  function = over_devices(ring(name, axis_name, chunk), way, devices)
  function = with_gradients(function)
  return function if way == 'pmap' else jax.jit(function)


@functools.cache
def expected(name):
  return jax.jit(with_gradients(single(name)))


def assert_equal_one_device(
  name, x, y, valid=None, temperature=0.1, *, way, devices=1, chunk=3, rtol=1e-5
):
  """Values and gradients within 1e-5, relative above what cancels in them.

  That is one for the values; the gradients are differences of weights that are
  divided by the temperature.
  """
  valid = np.ones(len(y), bool) if valid is None else valid
  arrays = (*map(jnp.asarray, (x, y, valid)), jnp.float32(temperature))
  ours = compiled(name, way, devices, chunk)(*arrays)
  for results, others, size in zip(
    ours, expected(name)(*arrays), (1, max(1, 1 / temperature)), strict=True
  ):
    for result, other in zip(results, others, strict=True):
      assert result.shape == other.shape
      result, other = np.float64(result), np.float64(other)
      assert np.all(np.isfinite(result))
      atol = 1e-5 * max(size, np.abs(other).max())
      np.testing.assert_allclose(result, other, rtol=rtol, atol=atol)


@pytest.fixture(params=LOSSES)
def name(request):
  return request.param


@pytest.fixture
def batch(rng):
  """Embeddings, labels and validity."""
  return (
    rng.normal(size=(N, E)).astype(np.float32),
    rng.integers(0, 9, N, np.int32),
    rng.random(N) < 0.9,
  )


@pytest.mark.parametrize(
  ('way', 'devices'),
  [('alone', 1)] + [(way, d) for way in WAYS[1:] for d in (2, 8)],
)
def test_values_and_gradients_equal_one_device(name, batch, way, devices):
  for temperature in (0.1, 1.0):
    assert_equal_one_device(name, *batch, temperature, way=way, devices=devices)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=25)
def test_any_labels_validity_and_chunk(name, data):
  way, devices = data.draw(
    st.sampled_from([('alone', 1), ('shard_map', 2), ('shard_map', 8)])
  )
  labels = st.integers(-2, data.draw(st.integers(-2, 12)))
  y = data.draw(st.lists(labels, min_size=N, max_size=N))
  valid = data.draw(st.lists(st.booleans(), min_size=N, max_size=N))
  rng = np.random.default_rng(data.draw(st.integers(0, 99)))
  x = rng.normal(size=(N, E)).astype(np.float32)
  assert_equal_one_device(
    name,
    x,
    np.int32(y),
    np.array(valid),
    data.draw(st.sampled_from([0.05, 0.5, 2.0])),
    way=way,
    devices=devices,
    chunk=data.draw(st.sampled_from([1, 3, 1000])),
  )


@pytest.mark.parametrize('way', ['alone', 'shard_map'])
def test_adversarial_batches_equal_one_device(name, batch, way):
  x, y, valid = batch
  check = functools.partial(assert_equal_one_device, name, way=way, devices=8)
  nobody, everybody = np.zeros(N, bool), np.ones(N, bool)
  alone = np.arange(N) == 7
  check(x, np.zeros_like(y))
  check(x, np.arange(N, dtype=np.int32))
  check(np.zeros_like(x), y)
  check(np.where(np.arange(N)[:, None] < 9, 0, x), y)
  check(np.broadcast_to(x[:1], x.shape), y)
  check(np.where(y[:, None] % 2, x[:1], -x[:1]), y, everybody, 0.05)
  check(x * 1e15, y, valid, 0.05)
  for kept in (nobody, alone, np.arange(N) < 5):
    check(x, y, kept)
  # Scores that would overflow and underflow without a normaliser.
  check(x, y, valid, 0.005, rtol=1e-4)


def test_padding_has_no_influence_even_where_it_is_nan(name, batch):
  x, y, valid = batch
  function = compiled(name, 'shard_map', 8, 3)
  point = jnp.float32(0.1)
  out, gradients = function(x, y, valid, point)
  spoiled = np.where(valid[:, None], x, np.nan)
  others = function(spoiled, np.where(valid, y, 3), valid, point)
  for one, other in zip(
    jax.tree.leaves((out, gradients)), jax.tree.leaves(others), strict=True
  ):
    np.testing.assert_array_equal(one, other)
  assert not np.any(np.asarray(out)[:, ~valid])
  assert not np.any(np.asarray(gradients[0])[~valid])


@pytest.mark.parametrize('way', ['alone', 'shard_map'])
def test_bfloat16_accumulates_in_float32(name, batch, way):
  x, y, valid = batch
  x = jnp.asarray(x, jnp.bfloat16)
  # The gradient is rounded to the dtype of the embeddings in the end.
  assert_equal_one_device(name, x, y, valid, way=way, devices=8, rtol=1e-2)
  point = jnp.float32(0.1)
  out, (gradient, _) = compiled(name, way, 8, 3)(x, y, valid, point)
  assert {array.dtype for array in out} == {jnp.dtype('float32')}
  assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize('n', [0, 1, 2])
def test_a_few_images_of_one_device(name, rng, n):
  x = jnp.asarray(rng.normal(size=(n, 3)), jnp.float32)
  y = jnp.zeros(n, int)
  out = ring(name, None, 256)(x, y, None, 0.1)
  others = single(name)(x, y, None, 0.1)
  for one, other in zip(out, others, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_published_reduction_is_formed_by_sums_over_devices(batch):
  x, y, valid = map(jnp.asarray, batch)

  def shard(x, y, valid, temperature):
    sums = sharded.ring_nt_xent(
      x, y, axis_name='d', valid=valid, temperature=temperature
    )
    total, number = jax.lax.psum(jax.tree.map(jnp.sum, sums), 'd')
    return (total / jnp.maximum(number, 1))[None]

  # A gradient inside shard_map, as a training step takes it.
  def slope(x, y, valid, temperature):
    return jax.grad(lambda x: shard(x, y, valid, temperature)[0])(x)

  def published(x):
    pairs = losses.nt_xent(x, y, valid=valid)
    return losses.mean_over_positive_pairs(pairs, y, valid)

  arrays = x, y, valid, jnp.float32(0.1)
  for function, other in (
    (shard, np.full(8, published(x))),
    (slope, jax.grad(published)(x)),
  ):
    result = jax.jit(over_devices(function, 'shard_map', 8))(*arrays)
    np.testing.assert_allclose(result, other, rtol=1e-5, atol=1e-6)


def test_a_gradient_inside_pmap_is_that_of_all_losses(name, batch):
  def shard(x, y, valid, temperature):
    def total(x):
      return ring(name, 'd', 3)(x, y, valid, temperature)[0].sum()

    return jax.grad(total)(x)

  arrays = *map(jnp.asarray, batch), jnp.float32(0.1)
  result = over_devices(shard, 'pmap', 8)(*arrays)
  other = jax.grad(lambda x: single(name)(x, *arrays[1:])[0].sum())(arrays[0])
  atol = 1e-5 * np.abs(other).max()
  np.testing.assert_allclose(result, other, rtol=1e-5, atol=atol)


def test_images_on_every_device_need_not_vary(name, batch):
  x, y, valid = (jnp.asarray(array[:5]) for array in batch)

  def shard(*_):
    return ring(name, 'd', 3)(x, y, valid, 0.1)[0]

  arrays = *map(jnp.asarray, batch), jnp.float32(0.1)
  out = jax.jit(over_devices(shard, 'shard_map', 8))(*arrays)
  repeated = [jnp.concatenate([array] * 8) for array in (x, y, valid)]
  other = single(name)(*repeated, 0.1)[0]
  np.testing.assert_allclose(out, other, rtol=1e-5, atol=1e-5)


def largest_array(function, arrays):
  """Elements of the largest array of a compiled program."""
  text = jax.jit(function).lower(*arrays).compile().as_text()
  shapes = re.findall(r'\b(?:f|s|u|bf|pred)\d*\[([\d,]+)\]', text)
  return max(math.prod(map(int, x.split(','))) for x in shapes), text


@pytest.mark.parametrize('way', ['alone', 'shard_map'])
def test_no_array_of_all_pairs_is_formed(name, rng, way):
  n, chunk = 512, 8
  arrays = (
    jnp.asarray(rng.normal(size=(n, 4)), jnp.float32),
    jnp.zeros(n, int),
    jnp.ones(n, bool),
    jnp.float32(0.1),
  )
  axis_name, local = (None, n) if way == 'alone' else ('d', n // 8)
  function = over_devices(ring(name, axis_name, chunk), way, 8)
  largest, text = largest_array(with_gradients(function), arrays)
  assert largest <= chunk * local
  assert 'all-gather' not in text
  assert largest_array(with_gradients(single(name)), arrays)[0] >= n * n


def test_a_fixed_temperature_may_be_an_integer(batch):
  x, y, _ = map(jnp.asarray, batch)
  np.testing.assert_allclose(
    sharded.ring_supervised_contrastive(x, y, axis_name=None, temperature=1),
    losses.supervised_contrastive(x, y, temperature=1),
    rtol=1e-5,
  )


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize(
  'loss', [sharded.ring_supervised_contrastive, sharded.ring_nt_xent]
)
def test_misuse_is_named(loss):
  x, y = jnp.ones((5, 3)), jnp.array([0, 0, 1, 2, 2])
  loss = functools.partial(loss, axis_name=None)
  with pytest.raises(ValueError, match=r'temperature=0\b'):
    loss(x, y, temperature=0)
  with pytest.raises(ValueError, match=r'chunk=0\b'):
    loss(x, y, chunk=0)
  with pytest.raises(ValueError, match=r'one per embedding.*\(4,\).*\(5, 3\)'):
    loss(x, y[:4])
  with pytest.raises(TypeError, match=r'integers.*float32'):
    loss(x, y * 1.0)
  with pytest.raises(ValueError, match=r'valid must be one per image.*\(3,\)'):
    loss(x, y, valid=jnp.ones(3, bool))
  with pytest.raises(TypeError, match=r'valid must be Boolean.*int32'):
    loss(x, y, valid=jnp.ones(5, jnp.int32))
