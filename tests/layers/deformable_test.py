"""Tests of `msba_jax.layers.deformable`."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from msba_jax.layers import deformable

SIZES = (2, 3), (4, 1)


def reference(values, locations, weights):
  values = [np.asarray(x, np.float64) for x in values]
  locations = np.asarray(locations, np.float64)
  weights = np.asarray(weights, np.float64)
  out = np.zeros((*weights.shape[:3], values[0].shape[-1]))
  for n, t, h, i, p in np.ndindex(weights.shape):
    grid, place = values[i][n, :, :, h], locations[n, t, h, i, p]
    shares = [
      np.maximum(1 - np.abs(at * size - 0.5 - np.arange(size)), 0)
      for at, size in zip(place, (grid.shape[1], grid.shape[0]), strict=True)
    ]
    read = np.einsum('y,x,yxf->f', shares[1], shares[0], grid)
    out[n, t, h] += weights[n, t, h, i, p] * read
  return out


def draw(rng, n=2, t=3, h=2, p=2, f=3, sizes=SIZES):
  """Values, locations and weights of any sign."""
  values = [rng.normal(size=(n, *size, h, f)) for size in sizes]
  shape = n, t, h, len(sizes), p
  given = values, rng.uniform(-0.3, 1.3, (*shape, 2)), rng.normal(size=shape)
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), given)


def slopes(function, array, right, left):
  """Difference quotients of a scalar function by every entry."""
  array = np.asarray(array, np.float64)
  found = np.zeros(array.shape)
  for place in np.ndindex(array.shape):
    more, less = array.copy(), array.copy()
    more[place] += right
    less[place] -= left
    found[place] = (function(more) - function(less)) / (right + left)
  return found


@hypothesis.settings(max_examples=6)
@hypothesis.given(
  n=st.sampled_from([1, 2]), t=st.sampled_from([1, 3]),
  h=st.sampled_from([1, 2]), p=st.sampled_from([1, 2]),
  sizes=st.sampled_from([((1, 1),), ((1, 4),), SIZES, ((3, 2), (2, 2))]),
  seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_reference(n, t, h, p, sizes, seed):
  rng = np.random.default_rng(seed)
  values, locations, weights = draw(rng, n, t, h, p, sizes=sizes)
  # Every second point on a border, a corner, a centre, or far outside.
  exact = jnp.asarray(rng.choice([0, 0.25, 0.5, 1, -7, 9], locations.shape))
  chosen = rng.random(locations.shape) < 0.5
  locations = jnp.where(chosen, exact.astype(jnp.float32), locations)
  np.testing.assert_allclose(
    jax.jit(deformable.deformable_attention)(values, locations, weights),
    reference(values, locations, weights),
    atol=2e-6,
  )


def test_gradients_equal_those_of_the_reference(rng):
  values, locations, weights = draw(rng)
  change = rng.normal(size=(2, 3, 2, 3))

  @jax.jit
  def pulled(values, locations, weights):
    _, pull = jax.vjp(
      deformable.deformable_attention, values, locations, weights
    )
    return pull(jnp.asarray(change, jnp.float32))

  found = pulled(values, locations, weights)

  def total(values, locations, weights):
    return np.sum(change * reference(values, locations, weights))

  step = 1e-6, 1e-6
  for i in range(2):
    expected = slopes(
      lambda x, i=i: total(
        [*values[:i], x, *values[i + 1 :]], locations, weights
      ),
      values[i],
      *step,
    )
    np.testing.assert_allclose(found[0][i], expected, atol=1e-5)
  expected = slopes(lambda x: total(values, x, weights), locations, *step)
  np.testing.assert_allclose(found[1], expected, atol=1e-4)
  assert np.abs(expected).max() > 1
  expected = slopes(lambda x: total(values, locations, x), weights, *step)
  np.testing.assert_allclose(found[2], expected, atol=1e-5)


def test_on_a_pixel_the_slope_is_the_one_ahead(rng):
  # Exact in binary: pixels −1, 0, 1 and 3, the last one, and 4, outside.
  places = (np.array([-1, 0, 1, 3, 4]) + 0.5) / 4
  points = np.stack(np.meshgrid(places, places), axis=-1)
  locations = jnp.asarray(points.reshape(1, 25, 1, 1, 1, 2), jnp.float32)
  weights = jnp.asarray(rng.normal(size=(1, 25, 1, 1, 1)), jnp.float32)
  values = draw(rng, 1, h=1, sizes=((4, 4),))[0]

  def total(locations):
    return jnp.sum(deformable.deformable_attention(values, locations, weights))

  expected = slopes(
    lambda x: np.sum(reference(values, x, weights)), locations, 1e-6, 0
  )
  found = jax.jit(jax.grad(total))(locations)
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_gradients_equal_finite_differences(rng):
  values, locations, weights = draw(rng, 1, 2, 1, 2, 2)
  # No point near a pixel, where the slope jumps.
  locations = (jnp.round(locations * 12) + 0.25) / 12
  attend = jax.jit(deformable.deformable_attention)
  given = values, locations, weights
  check_grads(attend, given, 1, ['rev'], eps=1e-3, rtol=2e-2, atol=2e-2)


def test_a_pixel_centre_reads_that_pixel(variant, rng):
  values, _, _ = draw(rng, 1, h=1, f=3, sizes=((2, 3),))
  centres = jnp.asarray(deformable.patch_centres(2, 3))
  read = variant(deformable.deformable_attention)(
    values, centres.reshape(1, 6, 1, 1, 1, 2), jnp.ones((1, 6, 1, 1, 1))
  )
  expected = values[0].reshape(1, 6, 1, 3)
  np.testing.assert_allclose(read, expected, atol=1e-6)


def test_outside_of_the_map_is_zero_and_takes_no_gradient(rng):
  values, locations, weights = draw(rng)
  locations = jnp.where(locations > 0.5, 2.5, -1.5)

  def total(*given):
    messages = deformable.deformable_attention(*given)
    return jnp.sum(messages), messages

  gradients, messages = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(
    values, locations, weights
  )
  for array in jax.tree.leaves((gradients, messages)):
    assert np.all(np.asarray(array) == 0)


def test_permuting_images_queries_and_points(rng):
  values, locations, weights = draw(rng)
  attend = jax.jit(deformable.deformable_attention)
  messages = attend(values, locations, weights)
  np.testing.assert_array_equal(
    attend([x[::-1] for x in values], locations[::-1], weights[::-1]),
    messages[::-1],
  )
  np.testing.assert_array_equal(
    attend(values, locations[:, ::-1], weights[:, ::-1]), messages[:, ::-1]
  )
  np.testing.assert_allclose(
    attend(values, locations[..., ::-1, :], weights[..., ::-1]),
    messages,
    atol=1e-6,
  )


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_the_result_has_the_dtype_of_the_values(rng, dtype):
  values, locations, weights = draw(rng)
  values = [x.astype(dtype) for x in values]
  messages, pull = jax.vjp(
    deformable.deformable_attention, values, locations, weights
  )
  assert messages.dtype == dtype
  # Summed in float32: the only error is that of the last rounding.
  expected = reference(values, locations, weights)
  np.testing.assert_allclose(
    messages.astype(jnp.float32),
    jnp.asarray(expected, dtype).astype(jnp.float32),
    rtol=float(jnp.finfo(dtype).eps),
    atol=1e-6,
  )
  gradients = pull(messages)
  assert {x.dtype for x in gradients[0]} == {jnp.dtype(dtype)}
  assert gradients[1].dtype == gradients[2].dtype == jnp.float32


def test_without_points_the_result_is_zero(rng):
  values, locations, weights = draw(rng, p=0)
  messages = deformable.deformable_attention(values, locations, weights)
  assert messages.shape == (2, 3, 2, 3)
  assert np.all(np.asarray(messages) == 0)


@pytest.mark.parametrize('way', ['sharded', 'shard_map'])
def test_sharded_equals_dense(rng, way):
  given = draw(rng, n=8, p=1, sizes=SIZES[:1])

  def value_and_gradient(attend):
    def total(*given):
      messages = attend(*given)
      return jnp.sum(messages**3), messages

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))

  attend = deformable.deformable_attention
  expected = value_and_gradient(attend)(*given)
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = jax.sharding.PartitionSpec('data')
  if way == 'shard_map':
    attend = jax.shard_map(
      attend, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows
    )
  sharded = jax.device_put(given, jax.sharding.NamedSharding(mesh, rows))
  compiled = value_and_gradient(attend).lower(*sharded).compile()
  chex.assert_trees_all_close(
    compiled(*sharded), expected, rtol=1e-5, atol=1e-5
  )
  # Images do not meet: no device sends values to another.
  assert 'all-gather' not in compiled.as_text()


def test_patch_centres_run_row_by_row():
  centres = deformable.patch_centres(2, 3)
  assert centres.dtype == np.float32
  for place in np.ndindex(2, 3):
    x, y = centres[place[0] * 3 + place[1]]
    np.testing.assert_allclose(x, (place[1] + 0.5) / 3, rtol=1e-6)
    np.testing.assert_allclose(y, (place[0] + 0.5) / 2, rtol=1e-6)


def test_the_ring_lies_on_a_square():
  offsets = deformable.ring_offsets(8, 3, 2)
  assert offsets.dtype == np.float32
  directions = [
    (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1),
  ]  # fmt: skip
  for h, level, p in np.ndindex(8, 3, 2):
    np.testing.assert_allclose(
      offsets[h, level, p], (p + 1) * np.array(directions[h]), atol=1e-6
    )
  np.testing.assert_allclose(
    deformable.ring_offsets(16, 1, 1)[1, 0, 0], [1, np.tan(np.pi / 8)], 1e-6
  )


@pytest.mark.usefixtures('unchecked')
def test_errors(rng):
  values, locations, weights = draw(rng)
  attend = deformable.deformable_attention
  with pytest.raises(ValueError, match='at least one level'):
    attend([], locations, weights)
  with pytest.raises(ValueError, match='agree in n, h and f'):
    attend([values[0], values[1][..., :2]], locations, weights)
  with pytest.raises(ValueError, match='agree in n, h and f'):
    attend([values[0], values[1][0]], locations, weights)
  with pytest.raises(ValueError, match='no tokens'):
    attend([values[0], values[1][:, :0]], locations, weights)
  with pytest.raises(ValueError, match='n=2 h=2 l=1'):
    attend(values[:1], locations, weights)
  with pytest.raises(ValueError, match='n=2 h=2 l=2'):
    attend(values, locations[..., :1], weights)
  with pytest.raises(ValueError, match='height=0'):
    deformable.patch_centres(0, 2)
  with pytest.raises(ValueError, match='num_points=0'):
    deformable.ring_offsets(2, 1, 0)
