"""Tests of `msba_jax.layers.distributed`."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from msba_jax.layers import (
  attention,
  block_plan,
  blocks,
  distributed,
  in_batch,
  sparse,
)

MAKERS = [distributed.gathered, distributed.ring]
MAKERS_AND_DEVICES = pytest.mark.parametrize(
  ('make', 'devices'),
  [(maker, devices) for maker in MAKERS for devices in (2, 8)],
)
ROWS = PartitionSpec('images')
MATRIX = PartitionSpec(None, 'images')


def draw(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def inputs(rng, n=8, h=2, d=4, f=3):
  """Queries, keys, values, bias, and a mask with an empty row and column."""
  mask = jnp.asarray(rng.random((h, n, n)) < 0.6)
  return (
    draw(rng, n, h, d),
    draw(rng, n, h, d),
    draw(rng, n, h, f),
    draw(rng, h, n, n),
    mask.at[:, 2].set(False).at[:, :, 5].set(False),
  )


def mesh_of(devices, *others):
  """A mesh of that many devices for the images, and other axes."""
  sizes = (devices, *others)
  return jax.make_mesh(
    sizes,
    ('images', 'others')[: len(sizes)],
    axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
    devices=jax.devices()[: int(np.prod(sizes))],
  )


def over_mesh(function, devices, *specs, check_vma=True):
  """The function in `jax.shard_map`; specs of what follows the values."""
  return jax.shard_map(
    function,
    mesh=mesh_of(devices),
    in_specs=(ROWS, ROWS, ROWS, *specs),
    out_specs=ROWS,
    check_vma=check_vma,
  )


def over_pmap(function, devices):
  """The same in `jax.pmap`, for a full bias and mask."""
  mapped = jax.pmap(
    function,
    axis_name='images',
    in_axes=(0, 0, 0, 1, 1),
    devices=jax.devices()[:devices],
  )

  def call(queries, keys, values, bias, mask):
    arrays = (
      x.reshape(devices, -1, *x.shape[1:]) for x in (queries, keys, values)
    )
    tables = (
      x.reshape(x.shape[0], devices, -1, x.shape[-1]) for x in (bias, mask)
    )
    return mapped(*arrays, *tables).reshape(values.shape)

  return call


def biased(attend_fn, **options):
  """The function with bias and mask by position."""

  def call(queries, keys, values, bias, mask):
    return attend_fn(queries, keys, values, bias=bias, mask=mask, **options)

  return call


def with_gradients(function, cotangent, arrays, *rest):
  """Messages and the gradients by the arrays."""
  messages, pull = jax.vjp(lambda *a: function(*a, *rest), *arrays)
  return messages, *pull(cotangent)


def reference(queries, keys, values, bias, mask):
  """Messages in float64, (n, h, d) and (h, n, m)."""
  q, k, v, b = (
    np.asarray(x, np.float64) for x in (queries, keys, values, bias)
  )
  mask = np.asarray(mask)
  scores = np.einsum('nhd,mhd->hnm', q, k) / np.sqrt(q.shape[-1]) + b
  peak = np.max(scores, axis=-1, keepdims=True, where=mask, initial=-1e300)
  raised = np.where(mask, np.exp(np.minimum(scores - peak, 0)), 0)
  total = raised.sum(-1, keepdims=True)
  weights = raised / np.where(total > 0, total, 1)
  return np.einsum('hnm,mhf->nhf', weights, v)


@pytest.mark.parametrize('devices', [2, 8])
@pytest.mark.parametrize('over', [over_mesh, over_pmap])
@pytest.mark.parametrize('make', MAKERS)
def test_values_and_gradients_are_those_of_one_device(rng, make, over, devices):
  *arrays, mask = inputs(rng)
  cotangent = draw(rng, 8, 2, 3)
  options = {'chunk': 2} if make is distributed.ring else {}
  attend_all = biased(make(attention.attend, 'images'), **options)
  if over is over_mesh:
    attend_all = jax.jit(over_mesh(attend_all, devices, MATRIX, MATRIX))
  else:
    attend_all = over_pmap(attend_all, devices)
  ours = with_gradients(attend_all, cotangent, arrays, mask)
  dense = biased(attention.attend)
  theirs = with_gradients(dense, cotangent, arrays, mask)
  np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
  np.testing.assert_allclose(ours[0], reference(*arrays, mask), atol=1e-6)
  chex.assert_trees_all_close(ours[1:], theirs[1:], atol=1e-5)
  # Image 2 sees nobody, and nobody sees image 5.
  messages, by_query, by_key, by_value, by_bias = map(np.asarray, ours)
  for zero in (messages[2], by_query[2], by_key[5], by_value[5], by_bias[:, 2]):
    assert np.all(zero == 0)
  assert np.all(by_bias[:, :, 5] == 0)
  assert np.any(by_query[1] != 0)


@pytest.mark.parametrize('make', MAKERS)
def test_attention_across_images(rng, make):
  arrays = draw(rng, 4, 3, 2, 4), draw(rng, 4, 3, 2, 4), draw(rng, 4, 3, 2, 3)
  bias, mask = draw(rng, 4, 4), ~jnp.eye(4, dtype=bool)
  whole = biased(in_batch.attend_across_images)
  part = biased(make(in_batch.attend_across_images, 'images'))
  check_equal(rng, whole, part, (*arrays, bias), mask, specs=(ROWS, ROWS))


@pytest.mark.parametrize('make', MAKERS)
@pytest.mark.parametrize('rows', [4, 1])
def test_attention_of_joint_tokens(rng, make, rows):
  arrays = draw(rng, 4, 3, 2, 4), draw(rng, 4, 2, 2, 4), draw(rng, 4, 2, 2, 4)
  mask = jnp.asarray(rng.random((rows, 4)) < 0.6).at[0].set(rows == 1)
  part = make(in_batch.attend_joint_tokens, 'images')
  check_equal(
    rng,
    lambda *a: in_batch.attend_joint_tokens(*a[:3], image_mask=a[3]),
    lambda *a: part(*a[:3], image_mask=a[3], chunk=3),
    arrays,
    mask,
    specs=(ROWS if rows > 1 else PartitionSpec(),),
  )


def check_equal(rng, whole, part, arrays, *rest, specs, check_vma=True):
  """Both have the same messages and gradients; part is spread over two."""
  queries, _, values = arrays[:3]
  cotangent = draw(rng, *queries.shape[:-1], values.shape[-1])
  part = over_mesh(part, 2, *specs, check_vma=check_vma)
  ours, theirs = (
    jax.jit(functools.partial(with_gradients, f))(cotangent, arrays, *rest)
    for f in (part, whole)
  )
  np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
  chex.assert_trees_all_close(ours[1:], theirs[1:], atol=1e-5)


@pytest.mark.parametrize('check_vma', [True, False])
@pytest.mark.parametrize(
  'shape', [(1, 8), (8, 1), (2, 1, 1)], ids=['row', 'column', 'head']
)
def test_broadcast_masks_and_replicated_biases(rng, shape, check_vma):
  arrays = inputs(rng)[:3]
  bias = draw(rng, *shape)
  mask = jnp.asarray(rng.random(shape) < 0.7)
  spec = ROWS if shape == (8, 1) else PartitionSpec()
  check_equal(
    rng,
    biased(attention.attend),
    biased(distributed.ring(attention.attend, 'images'), chunk=(3, 2)),
    (*arrays, bias),
    mask,
    specs=(spec, spec),
    check_vma=check_vma,
  )


@pytest.mark.parametrize('make', MAKERS)
def test_another_axis_of_the_mesh_divides_the_batch(rng, make):
  arrays = [draw(rng, 2, 4, 2, 3) for _ in range(3)]
  bias = draw(rng, 2, 4, 4)
  cotangent = draw(rng, 2, 4, 2, 3)
  batch = PartitionSpec('others', 'images')
  attend_all = jax.shard_map(
    lambda q, k, v, b: make(attention.attend, 'images')(q, k, v, bias=b),
    mesh=mesh_of(2, 2),
    in_specs=(batch, batch, batch, MATRIX),
    out_specs=batch,
  )
  ours, theirs = (
    jax.jit(functools.partial(with_gradients, f))(cotangent, (*arrays, bias))
    for f in (attend_all, lambda *a: attention.attend(*a[:3], bias=a[3]))
  )
  np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
  chex.assert_trees_all_close(ours[1:], theirs[1:], atol=1e-5)


# Every example compiles: there is no time to look for the smallest failure.
@hypothesis.settings(max_examples=4, phases=[hypothesis.Phase.generate])
@hypothesis.given(
  n=st.sampled_from([1, 3]), m=st.sampled_from([1, 2]),
  f=st.sampled_from([1, 5]), chunk=st.sampled_from([None, 1, (2, 1)]),
  size=st.sampled_from([1e-3, 1.0, 30.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_ring_equals_the_float64_reference(n, m, f, chunk, size, seed):
  rng = np.random.default_rng(seed)
  arrays = size * draw(rng, 4 * n, 2, 3), size * draw(rng, 4 * m, 2, 3)
  arrays = *arrays, draw(rng, 4 * m, 2, f), draw(rng, 2, 4 * n, 4 * m)
  mask = jnp.asarray(rng.random((2, 4 * n, 4 * m)) < 0.6)
  attend_all = distributed.ring(attention.attend, 'images')
  messages = jax.jit(
    over_mesh(biased(attend_all, chunk=chunk), 4, MATRIX, MATRIX)
  )(*arrays, mask)
  tolerance = 4e-6 * (1 + 3 * size**2)
  np.testing.assert_allclose(messages, reference(*arrays, mask), atol=tolerance)


@pytest.mark.parametrize('make', MAKERS)
def test_one_device_alone(rng, make):
  *arrays, mask = inputs(rng, n=6)
  attend_all = biased(make(attention.attend, 'images'))
  messages = jax.jit(over_mesh(attend_all, 1, MATRIX, MATRIX))(*arrays, mask)
  np.testing.assert_allclose(messages, reference(*arrays, mask), atol=1e-6)


@pytest.mark.parametrize('make', MAKERS)
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_the_result_has_the_dtype_of_the_values(rng, make, dtype):
  *arrays, bias, mask = inputs(rng)
  arrays = [x.astype(dtype) for x in arrays]
  attend_all = biased(make(attention.attend, 'images'))
  attend_all = over_mesh(attend_all, 2, MATRIX, MATRIX)
  ours = jax.jit(functools.partial(with_gradients, attend_all))(
    jnp.ones((8, 2, 3), dtype), (*arrays, bias), mask
  )
  chex.assert_type(ours, [dtype] * 4 + [jnp.float32])
  expected = reference(*arrays, bias, mask)
  np.testing.assert_allclose(
    np.asarray(ours[0], np.float64), expected, atol=2e-2
  )


def test_permuting_the_keys_of_all_devices_changes_nothing(rng):
  queries, keys, values, bias, mask = inputs(rng)
  order = rng.permutation(8)
  attend_all = biased(distributed.ring(attention.attend, 'images'))
  attend_all = jax.jit(over_mesh(attend_all, 4, MATRIX, MATRIX))
  messages = attend_all(queries, keys, values, bias, mask)
  bias, mask = bias[:, :, order], mask[:, :, order]
  permuted = attend_all(queries, keys[order], values[order], bias, mask)
  np.testing.assert_allclose(permuted, messages, atol=1e-6)


def test_a_global_view_needs_neither(rng):
  *arrays, mask = inputs(rng)
  cotangent = draw(rng, 8, 2, 3)
  mesh = mesh_of(8)
  sharded = [
    jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    for x, spec in zip(arrays, (ROWS, ROWS, ROWS, MATRIX), strict=True)
  ]
  run = functools.partial(with_gradients, biased(attention.attend))
  ours = jax.jit(run)(cotangent, sharded, mask)
  chex.assert_trees_all_close(ours, run(cotangent, arrays, mask), atol=1e-5)


def test_a_ring_gathers_nothing_and_its_memory_does_not_grow():
  images, heads, features = 64, 4, 16
  shard = 4 * images * heads * features

  def compiled(make, devices):
    array = jax.ShapeDtypeStruct(
      (images * devices, heads, features), jnp.float32
    )
    attend_all = functools.partial(make(attention.attend, 'images'), chunk=16)
    return (
      jax.jit(functools.partial(with_gradients, over_mesh(attend_all, devices)))
      .lower(array, (array,) * 3)
      .compile()
    )

  programs = [compiled(distributed.ring, devices) for devices in (2, 4, 8)]
  memory = [x.memory_analysis().temp_size_in_bytes / shard for x in programs]
  # A loop of one step, as two devices have it, needs less.
  assert memory[0] <= memory[1] == pytest.approx(memory[2], rel=0.01)
  assert memory[2] <= 14
  text = programs[2].as_text()
  assert 'all-gather' not in text
  assert 'collective-permute' in text
  gathered = compiled(distributed.gathered, 8)
  assert 'all-gather' in gathered.as_text()
  whole = gathered.memory_analysis().temp_size_in_bytes / shard
  assert memory[2] < whole / 3


@pytest.mark.usefixtures('unchecked')
def test_wrong_functions_and_arguments_are_named(rng):
  with pytest.raises(TypeError, match=r'ring takes attend, .*use gathered'):
    distributed.ring(jax.nn.dot_product_attention, 'images')
  *arrays, bias, mask = inputs(rng)
  attend_all = distributed.ring(attention.attend, 'images')

  def call(**options):
    return over_mesh(functools.partial(attend_all, **options), 2)(*arrays)

  with pytest.raises(ValueError, match="implementation='dense' must be"):
    call(implementation='dense')
  with pytest.raises(ValueError, match='chunk=0 must be at least 1'):
    call(chunk=0)
  with pytest.raises(ValueError, match=r'mask must broadcast .*\(2, 4, 8\)'):
    call(mask=mask)
  with pytest.raises(ValueError, match=r'bias must broadcast'):
    call(bias=bias[:, :4, :4])
  with pytest.raises(TypeError, match='mask must be Boolean'):
    call(mask=mask[:, :4].astype(jnp.int32))
  with pytest.raises(TypeError, match='image_mask'):
    call(image_mask=mask[0])


def test_options_given_in_advance_keep_the_layout(rng):
  arrays = [draw(rng, 4, 2, 1, 3) for _ in range(3)]
  attend_fn = functools.partial(in_batch.attend_joint_tokens, scale=0.3)
  messages = jax.jit(over_mesh(distributed.gathered(attend_fn, 'images'), 2))(
    *arrays
  )
  np.testing.assert_allclose(messages, attend_fn(*arrays), atol=1e-6)


def sparse_inputs(rng, devices=4, block=2, n=16, keep=3):
  """Queries, keys, values and, for two heads, blocks or none."""
  queries, keys, values = (draw(rng, n, 2, 4) for _ in range(3))
  indices = rng.integers(-1, n // block, (2, n // block, keep))
  indices[:, 1] = -1
  return queries, keys, values, jnp.asarray(indices, jnp.int32)


@MAKERS_AND_DEVICES
def test_chosen_blocks_of_all_devices(rng, make, devices):
  *arrays, indices = sparse_inputs(rng)
  weights = draw(rng, 16, 2, 4)
  attend = make(sparse.attend_blocks, 'images')

  def local(queries, keys, values, indices):
    return attend(queries, keys, values, indices, block=2)

  mapped = over_mesh(local, devices, MATRIX)

  def value_and_gradients(function):
    def total(*arrays):
      return jnp.sum(function(*arrays, indices) * weights)

    return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*arrays)

  chex.assert_trees_all_close(
    value_and_gradients(mapped),
    value_and_gradients(functools.partial(sparse.attend_blocks, block=2)),
    atol=2e-5,
  )
  messages = jax.jit(mapped)(*arrays, indices)
  assert np.all(np.asarray(messages[2:4]) == 0)


@MAKERS_AND_DEVICES
def test_chosen_images_of_all_devices(rng, make, devices):
  arrays = [draw(rng, 8, 3, 2, 4) for _ in range(3)]
  indices = jnp.asarray(rng.integers(-1, 8, (8, 2)), jnp.int32)
  mapped = over_mesh(make(sparse.attend_image_blocks, 'images'), devices, ROWS)
  np.testing.assert_allclose(
    jax.jit(mapped)(*arrays, indices),
    sparse.attend_image_blocks(*arrays, indices),
    atol=2e-6,
  )


def test_a_ring_computes_only_the_chosen_blocks_it_meets(rng, monkeypatch):
  monkeypatch.setattr(block_plan, 'STEP', (2, 2))
  *arrays, _ = sparse_inputs(rng)
  # Eight blocks on four devices: only the first device is ever read.
  indices = jnp.zeros((8, 2), jnp.int32).at[:, 1].set(1)
  gathers = []
  gather = blocks.gather_blocks

  def counted(array, chosen):
    jax.debug.callback(lambda x: gathers.append(x), chosen)
    return gather(array, chosen)

  monkeypatch.setattr(blocks, 'gather_blocks', counted)
  attend = distributed.ring(sparse.attend_blocks, 'images')
  mapped = over_mesh(functools.partial(attend, block=2), 4, ROWS)
  jax.block_until_ready(jax.jit(mapped)(*arrays, indices))
  jax.effects_barrier()
  # Two heads, eight rows of two blocks, each gathered once in all.
  assert len(gathers) == 2 * 8 * 2


@pytest.mark.usefixtures('unchecked')
def test_blocks_must_not_be_divided_by_devices(rng):
  *arrays, _ = sparse_inputs(rng)
  attend = distributed.ring(sparse.attend_blocks, 'images')
  mapped = over_mesh(functools.partial(attend, block=(2, 8)), 4, ROWS)
  with pytest.raises(ValueError, match='no whole number of blocks of 8'):
    mapped(*arrays, jnp.zeros((8, 1), jnp.int32))
