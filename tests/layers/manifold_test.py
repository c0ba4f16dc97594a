"""Tests of `msba_jax.layers.manifold`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from msba_jax.layers import manifold

VARIANTS = 'vanilla', 'simple', 'unbalanced_atlas', 'spatial'
# One token before a grid of 2 × 3; three charts of four features.
COUNT, FEATURES, RANK, WIDTH, TOKENS = 3, 4, 2, 5, 7
GRID = {'grid': (2, 3), 'prefix': 1}
KINDS = [('vanilla', False), ('vanilla', True)] + [
  (variant, factors) for variant in VARIANTS[1:] for factors in (False, True)
]


def random(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def make_params(rng, variant, factored):
  """Of 'vanilla', factored means that there is an output."""
  joined = variant == 'vanilla'
  inner = RANK if factored and not joined else WIDTH
  return manifold.ManifoldParams(
    scales=random(rng, COUNT, FEATURES),
    charts=random(rng, COUNT, FEATURES, inner),
    biases=random(rng, COUNT, WIDTH),
    factors=None
    if joined or inner == WIDTH
    else random(rng, COUNT, RANK, WIDTH),
    output=random(rng, COUNT * WIDTH, 6) if joined and factored else None,
    membership=(
      random(rng, FEATURES, COUNT)
      if variant in ('unbalanced_atlas', 'spatial')
      else None
    ),
    kernel=random(rng, 3, 3, COUNT) if variant == 'spatial' else None,
  )


def call(variant, **options):
  place = GRID if variant == 'spatial' else {}

  def keys(inputs, params):
    return manifold.manifold_keys(
      inputs, params, variant=variant, **place, **options
    )

  return keys


def gelu(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def reference(inputs, params, variant, activation, broadcast=False):
  """The equations as they stand, one image, token and chart at a time."""
  double = [None if x is None else np.asarray(x, np.float64) for x in params]
  scales, charts, biases, factors, output, membership, kernel = double
  x = np.asarray(inputs, np.float64)
  x = (x + x.mean(axis=1, keepdims=True)) / 2 if broadcast else x
  maps = [
    charts[q] if factors is None else charts[q] @ factors[q]
    for q in range(COUNT)
  ]
  parts = [
    activation((scales[q] * x) @ maps[q] + biases[q]) for q in range(COUNT)
  ]
  if variant == 'vanilla':
    joined = np.concatenate(parts, axis=-1)
    return joined if output is None else joined @ output
  if variant == 'simple':
    return sum(parts) / COUNT
  logits = x @ membership
  if variant == 'spatial':
    maps = logits[:, 1:].reshape(-1, 2, 3, COUNT)
    found = np.zeros_like(maps)
    for y, z, i, j in np.ndindex(2, 3, 3, 3):
      if 0 <= y + i - 1 < 2 and 0 <= z + j - 1 < 3:
        found[:, y, z] += kernel[i, j] * maps[:, y + i - 1, z + j - 1]
    logits = np.concatenate([logits[:, :1], found.reshape(-1, 6, COUNT)], 1)
  shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  return sum(shares[..., q, None] * parts[q] for q in range(COUNT))


@pytest.mark.parametrize(
  ('linear', 'broadcast'), [(False, True), (True, False)]
)
@pytest.mark.parametrize(('name', 'factored'), KINDS)
def test_equals_the_equations(variant, rng, name, factored, linear, broadcast):
  inputs = random(rng, 2, TOKENS, FEATURES)
  params = make_params(rng, name, factored)
  options = {'activation': None} if linear else {}
  found = variant(call(name, broadcast_context=broadcast, **options))(
    inputs, params
  )
  activation = (lambda x: x) if linear else gelu
  expected = reference(inputs, params, name, activation, broadcast)
  np.testing.assert_allclose(found.keys, expected, rtol=2e-5, atol=2e-5)
  assert (found.memberships is None) == (name in ('vanilla', 'simple'))
  if found.memberships is not None:
    assert found.memberships.shape == (2, TOKENS, COUNT)
    np.testing.assert_allclose(found.memberships.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize('name', VARIANTS)
def test_one_plain_chart_is_the_ordinary_projection(rng, name):
  inputs = random(rng, TOKENS, FEATURES)
  kernel = random(rng, FEATURES, WIDTH)
  params = manifold.ManifoldParams(
    jnp.ones((1, FEATURES)),
    kernel[None],
    jnp.zeros((1, WIDTH)),
    output=jnp.eye(WIDTH) if name == 'vanilla' else None,
    membership=(
      random(rng, FEATURES, 1)
      if name in ('unbalanced_atlas', 'spatial')
      else None
    ),
    kernel=random(rng, 3, 3, 1) if name == 'spatial' else None,
  )
  keys = call(name, activation=None)(inputs, params).keys
  np.testing.assert_allclose(keys, inputs @ kernel, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', VARIANTS)
def test_only_spatial_keys_depend_on_the_order_of_tokens(rng, name):
  inputs = random(rng, 2, TOKENS, FEATURES)
  keys = jax.jit(call(name, broadcast_context=True))
  params = make_params(rng, name, False)
  order = np.array([0, 3, 1, 6, 2, 5, 4])
  moved = keys(inputs[:, order], params).keys
  kept = keys(inputs, params).keys[:, order]
  if name == 'spatial':
    assert np.abs(moved - kept).max() > 0.01
  else:
    np.testing.assert_allclose(moved, kept, rtol=1e-5, atol=1e-5)


def test_spatial_keys_see_neighbours_and_a_prefix_only_itself(rng):
  params = make_params(rng, 'spatial', False)
  inputs = random(rng, 14, FEATURES)

  def keys(inputs):
    return manifold.manifold_keys(
      inputs, params, variant='spatial', grid=(3, 4), prefix=2
    ).keys

  seen = np.abs(jax.jit(jax.jacobian(keys))(inputs)).max(axis=(1, 3)) > 0
  y, x = np.divmod(np.arange(12), 4)
  near = (abs(y[:, None] - y) <= 1) & (abs(x[:, None] - x) <= 1)
  expected = np.eye(14, dtype=bool)
  expected[2:, 2:] = near
  np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize(('name', 'factored'), KINDS)
def test_the_gradient_reaches_every_parameter(rng, name, factored):
  inputs = random(rng, 2, TOKENS, FEATURES)
  params = make_params(rng, name, factored)
  weights = random(rng, 2, TOKENS, 6 if params.output is not None else 15)

  @jax.jit
  @jax.grad
  def gradient(params):
    keys = call(name)(inputs, params).keys
    return jnp.sum(keys * weights[..., : keys.shape[-1]])

  for leaf in jax.tree.leaves(gradient(params)):
    assert np.all(np.asarray(leaf) != 0)


@pytest.mark.parametrize('linear', [False, True])
@pytest.mark.parametrize('name', VARIANTS)
def test_gradients_equal_finite_differences(rng, name, linear):
  inputs = random(rng, TOKENS, FEATURES)
  params = make_params(rng, name, True)
  keys = call(name, activation=None if linear else jax.nn.gelu)
  check_grads(
    jax.jit(lambda *given: keys(*given).keys),
    (inputs, params),
    1,
    rtol=3e-2,
    atol=3e-2,
  )


@pytest.mark.parametrize('linear', [False, True])
@pytest.mark.parametrize('name', VARIANTS)
def test_the_dtype_of_the_inputs_comes_back(rng, name, linear):
  inputs = random(rng, TOKENS, FEATURES)
  params = make_params(rng, name, True)
  keys = jax.jit(call(name, activation=None if linear else jax.nn.gelu))
  found = keys(inputs.astype(jnp.bfloat16), params)
  assert found.keys.dtype == jnp.bfloat16
  # The products of eight bits are off by a few of their last ones.
  exact = keys(inputs, params).keys
  difference = found.keys.astype(jnp.float32) - exact
  assert np.abs(difference).max() < 0.05 * np.abs(exact).max()
  if found.memberships is not None:
    assert found.memberships.dtype == jnp.float32
    np.testing.assert_allclose(found.memberships.sum(-1), 1, rtol=1e-6)


def test_extremes_stay_finite(rng):
  params = make_params(rng, 'spatial', True)
  inputs = 1e4 * random(rng, TOKENS, FEATURES)

  def total(inputs, params):
    found = call('spatial')(inputs, params)
    return jnp.sum(found.keys) + jnp.sum(found.memberships)

  chex.assert_tree_all_finite(
    jax.jit(jax.value_and_grad(total, (0, 1)))(inputs, params)
  )


def test_the_penalty_is_lowest_where_one_chart_has_everything(variant, rng):
  memberships = jax.nn.softmax(random(rng, 2, 5, COUNT))
  found = variant(manifold.membership_penalty)(memberships)
  expected = -0.1 * np.sum((np.asarray(memberships) - 1 / COUNT) ** 2, axis=-1)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  alone = manifold.membership_penalty(jnp.eye(COUNT)[:1], weight=-1.0)
  np.testing.assert_allclose(alone, [-(1 - 1 / COUNT)], rtol=1e-6)
  uniform = manifold.membership_penalty(jnp.full((1, COUNT), 1 / COUNT))
  np.testing.assert_allclose(uniform, [0], atol=1e-12)


@pytest.mark.usefixtures('unchecked')
def test_errors_name_the_parameter(rng):
  inputs = random(rng, TOKENS, FEATURES)
  simple = make_params(rng, 'simple', True)
  vanilla = make_params(rng, 'vanilla', True)
  spatial = make_params(rng, 'spatial', False)
  wrong = [
    ('other', simple, {}, r"variant='other' must be one of"),
    ('simple', vanilla, {}, r"takes no more than \['factors'\]: \['output'\]"),
    ('vanilla', simple, {}, r"takes no more than \['output'\]: \['factors'\]"),
    ('unbalanced_atlas', simple, {}, r"needs \['membership'\]"),
    ('simple', simple, {'grid': (2, 3)}, 'neither grid nor prefix'),
    ('simple', simple, {'prefix': 1}, 'neither grid nor prefix'),
    ('spatial', spatial, {}, 'needs a grid'),
    ('spatial', spatial, {'grid': (2, 3)}, r'prefix=0 and grid=\(2, 3\) do'),
    ('spatial', spatial, {'grid': (-2, -3), 'prefix': 1}, 'do not make'),
    ('spatial', spatial, {'grid': (3, 3), 'prefix': -2}, 'do not make'),
  ]
  for name, bad in [
    ('scales', (2, FEATURES)),
    ('charts', (COUNT, 3, RANK)),
    ('biases', (COUNT, RANK)),
    ('factors', (COUNT, 3, WIDTH)),
  ]:
    params = simple._replace(**{name: jnp.zeros(bad)})
    wrong.append(('simple', params, {}, f'{name} must be'))
  flat = simple._replace(charts=jnp.zeros((FEATURES, WIDTH)))
  wrong.append(('simple', flat, {}, r'charts must be \(q, d, width\)'))
  short = vanilla._replace(output=jnp.zeros((4, 6)))
  wrong.append(('vanilla', short, {}, r'output must be \(15, 6\)'))
  for name, params, options, message in wrong:
    with pytest.raises(ValueError, match=message):
      manifold.manifold_keys(inputs, params, variant=name, **options)
