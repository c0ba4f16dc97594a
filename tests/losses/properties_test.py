"""What holds for every loss: numbers, gradients, padding, order, extremes."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

N, E, C = 8, 5, 3
WITH_PADDING = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)


def inputs(rng, n=N, e=E, c=C):
  """Random embeddings, labels and proxies."""
  return (
    rng.normal(size=(n, e)).astype(np.float32),
    rng.integers(0, c, n, np.int32),
    rng.normal(size=(c, e)).astype(np.float32),
  )


def weights_of(shape):
  """Fixed weights that tell the entries of an unreduced loss apart."""
  return np.cos(np.arange(np.prod(shape))).reshape(shape).astype(np.float32)


def weighted(function, y, valid):
  """Weighted sum of a loss, and the loss, of embeddings and proxies."""

  def total(x, w):
    values = function(x, y, w, valid)
    return (values * weights_of(values.shape)).sum(), values

  return total


def differences(function, arrays, step=1e-6):
  """Central differences of a scalar function of float64 arrays."""
  gradients = []
  for position, array in enumerate(arrays):
    gradient = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
      ends = []
      for side in (step, -step):
        moved = [a.copy() for a in arrays]
        moved[position][index] += side
        ends.append(function(*moved)[0])
      gradient[index] = (ends[0] - ends[1]) / (2 * step)
    gradients.append(gradient)
  return gradients


def assert_equal_the_reference(case, x, y, w, valid, transform=jax.jit):
  """Values and gradients, both within 1e-5 (relative above one)."""
  function = weighted(case.loss, jnp.asarray(y), jnp.asarray(valid))
  gradients, values = transform(jax.grad(function, (0, 1), has_aux=True))(
    jnp.asarray(x), jnp.asarray(w)
  )
  doubles = np.float64(x), np.float64(w)
  reference = weighted(case.reference, y, valid)
  np.testing.assert_allclose(
    values, reference(*doubles)[1], rtol=1e-5, atol=1e-5
  )
  expected = differences(reference, doubles)
  for gradient, other in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(
      gradient, other, rtol=1e-5, atol=1e-5 * max(1, np.abs(other).max())
    )


def test_values_and_gradients_equal_the_reference(case, rng, variant):
  assert_equal_the_reference(case, *inputs(rng), WITH_PADDING, variant)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=12)
def test_any_shape_equals_the_reference(cases, data):
  name = data.draw(st.sampled_from(sorted(cases)))
  n, e, c = (data.draw(st.integers(1, top)) for top in (7, 5, 4))
  rng = np.random.default_rng(data.draw(st.integers(0, 99)))
  x, y, w = inputs(rng, n, e + 1, c)
  valid = rng.random(n) < data.draw(st.sampled_from([0.0, 0.7, 1.0]))
  assert_equal_the_reference(cases[name], x, y, w, valid)


def test_permuting_the_images_permutes_the_losses(case, rng):
  x, y, w = inputs(rng)
  order = rng.permutation(N)
  loss = jax.jit(case.loss)
  losses = np.asarray(loss(x, y, w, WITH_PADDING))
  expected = {
    'images': lambda: losses[order],
    'pairs': lambda: losses[order][:, order],
    'table': lambda: losses[order],
    'proxies': lambda: losses,
  }[case.axis]()
  permuted = loss(x[order], y[order], w, WITH_PADDING[order])
  np.testing.assert_allclose(permuted, expected, atol=1e-5)


def without_padding(losses, axis):
  """The entries of an unreduced loss that belong to valid images."""
  if axis == 'proxies':
    return losses
  losses = losses[WITH_PADDING]
  return losses[:, WITH_PADDING] if axis == 'pairs' else losses


def test_padding_has_no_influence_and_no_gradient(case, rng):

  @jax.jit
  def values_and_gradients(x, y, w, valid):
    losses, pull_back = jax.vjp(lambda x, w: case.loss(x, y, w, valid), x, w)
    return losses, pull_back(weights_of(losses.shape))

  x, y, w = inputs(rng)
  alone = jax.jit(case.loss)(
    x[WITH_PADDING], y[WITH_PADDING], w, np.ones(WITH_PADDING.sum(), bool)
  )
  y[~WITH_PADDING] = (0, -1)
  for rubbish in (1.0, 1e30, np.inf, np.nan):
    x[~WITH_PADDING] = rubbish
    losses, gradients = values_and_gradients(x, y, w, WITH_PADDING)
    assert np.all(np.asarray(gradients[0])[~WITH_PADDING] == 0)
    chex.assert_tree_all_finite(gradients)
    kept = without_padding(np.asarray(losses), case.axis)
    np.testing.assert_allclose(kept, alone, rtol=1e-5, atol=1e-6)
    if case.axis != 'proxies':
      assert np.count_nonzero(losses) == np.count_nonzero(kept)


def test_valid_may_be_left_out(case, rng):
  x, y, w = map(jnp.asarray, inputs(rng))
  np.testing.assert_array_equal(
    case.loss(x, y, w, None), case.loss(x, y, w, jnp.ones(N, bool))
  )


def adversarial(rng):
  """Batches of one shape that break what is written carelessly."""
  x, y, w = inputs(rng)
  usual = {'x': x, 'y': y, 'w': w, 'valid': np.ones(N, bool)}
  one = rng.normal(size=(1, E)).repeat(N, 0)
  first = x.copy()
  first[0] = 0
  signs = np.where(np.arange(N) % 2, 1, -1)[:, None]
  changes = {
    'all classes distinct': {'y': np.arange(N)},
    'one class': {'y': np.zeros(N)},
    'unknown classes': {'y': -np.ones(N)},
    'zero vectors': {'x': 0 * x},
    'one zero vector': {'x': first},
    'all vectors equal': {'x': one},
    'opposite vectors': {'x': one * signs, 'y': np.zeros(N)},
    'huge vectors': {'x': 1e12 * x},
    'tiny vectors': {'x': 1e-12 * x},
    'zero proxies': {'w': 0 * w},
    'vectors are their proxies': {'x': w[y]},
    'vectors are opposite to their proxies': {'x': -w[y]},
    'nothing valid': {'valid': np.zeros(N, bool)},
    'one valid': {'valid': np.arange(N) == 3},
  }
  for name, change in changes.items():
    yield name, {**usual, **change}


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_adversarial_batches_stay_finite(case, rng, dtype):

  @jax.jit
  def values_and_gradients(x, y, w, valid):
    losses, pull_back = jax.vjp(lambda x, w: case.loss(x, y, w, valid), x, w)
    return losses, pull_back(weights_of(losses.shape) + 1.5)

  for name, batch in adversarial(rng):
    losses, gradients = values_and_gradients(
      jnp.asarray(batch['x'], dtype),
      jnp.asarray(batch['y'], jnp.int32),
      jnp.asarray(batch['w'], dtype),
      jnp.asarray(batch['valid']),
    )
    chex.assert_type(losses, jnp.float32)
    chex.assert_type(gradients, dtype)
    for array in (losses, *gradients):
      assert np.all(np.isfinite(np.asarray(array, np.float64))), name
    assert np.all(np.asarray(losses) >= -1e-5), name
    if name == 'nothing valid':
      assert not np.any(np.asarray(losses))
      assert not np.any(np.asarray(gradients[0], np.float32))


def test_a_batch_of_one_is_finite(case, rng):
  x, y, w = map(jnp.asarray, inputs(rng, n=1))
  total = weighted(case.loss, y, jnp.ones(1, bool))
  gradients, values = jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, w)
  chex.assert_tree_all_finite((gradients, values))


def test_bfloat16_is_near_float32(case, rng):
  x, y, w = inputs(rng)
  short = [jnp.asarray(a, jnp.bfloat16) for a in (x, w)]
  long = [a.astype(jnp.float32) for a in short]
  loss = jax.jit(case.loss)
  np.testing.assert_allclose(
    loss(short[0], y, short[1], WITH_PADDING),
    loss(long[0], y, long[1], WITH_PADDING),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize('name', ['supervised_contrastive', 'triplet'])
def test_a_batch_over_devices_changes_nothing(cases, rng, name):
  x, y, w = inputs(rng, n=16)
  valid = rng.random(16) < 0.8
  expected = cases[name].loss(*map(jnp.asarray, (x, y, w, valid)))
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  losses = jax.jit(cases[name].loss)(
    *(jax.device_put(a, rows) for a in (x, y)), w, jax.device_put(valid, rows)
  )
  np.testing.assert_allclose(losses, expected, atol=1e-5)
