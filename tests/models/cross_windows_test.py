"""Stripes in four directions, and the width that each image chooses."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.cross_windows import (
  ASKED,
  DIRECTIONS,
  CrossWindowAttention,
  spread_places,
)
from tests.models.conftest import perturbed

HEADS = (1, 1, 1, 1)


@functools.cache
def made(heads=HEADS, widths=(1, 2, 4), side=(4, 6), inner=None):
  """The module, a compiled apply, and parameters without special values."""
  module = CrossWindowAttention(heads, widths, qkv_features=inner)
  variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *side, 8)))
  apply = jax.jit(lambda v, grid, rngs: module.apply(v, grid, rngs=rngs))
  params = perturbed(variables, 0.3)['params']
  if 'width' in params:
    # Its output counts tenfold: less, or all images choose the same.
    params['width'] = perturbed(variables['params']['width'], 0.02)
  return module, apply, {'params': params}


@pytest.fixture
def grid(rng):
  """Five grids of four rows and six columns, which choose differently."""
  scale = np.array([0.2, 1.0, 2.0, 4.0, -3.0]).reshape(5, 1, 1, 1)
  return jnp.asarray(scale * rng.normal(size=(5, 4, 6, 8)), jnp.float32)


def group_of(direction, row, column, stripe, side):
  """The number of the stripe of a token."""
  most = max(side)
  line = {
    'horizontal': row,
    'vertical': column,
    'diagonal': (row - column) % most,
    'antidiagonal': (row + column) % most,
  }[direction]
  return line // stripe


def attended(params, grid, stripe):
  """What tokens of one image get in stripes, in float64; and all values."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  height, width, d = grid.shape
  tokens = np.asarray(grid, np.float64).reshape(-1, d)
  qkv = tokens @ params['qkv']['kernel'] + params['qkv']['bias']
  queries, keys, values = np.split(qkv, 3, axis=1)
  places = [(y, x) for y in range(height) for x in range(width)]
  messages = np.zeros_like(values)
  parts = np.split(np.arange(values.shape[1]), len(DIRECTIONS))
  for part, direction in zip(parts, DIRECTIONS, strict=True):
    groups = np.array(
      [group_of(direction, *at, stripe, (height, width)) for at in places]
    )
    for t, group in enumerate(groups):
      same = np.flatnonzero(groups == group)
      seen = np.ix_(same, part)
      scores = keys[seen] @ queries[t, part] / np.sqrt(len(part))
      weights = np.exp(scores - scores.max())
      messages[t, part] = weights @ values[seen] / weights.sum()
  return messages, values


def reference(params, grid, stripe):
  """Messages of one image in float64, token by token."""
  messages, values = attended(params, grid, stripe)
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  height, width, _ = grid.shape
  places = [(y, x) for y in range(height) for x in range(width)]
  padded = np.pad(values.reshape(height, width, -1), ((1, 1), (1, 1), (0, 0)))
  kernel = params['local']['kernel'][:, :, 0]
  for t, (y, x) in enumerate(places):
    near = padded[y : y + 3, x : x + 3]
    messages[t] += (near * kernel).sum(axis=(0, 1)) + params['local']['bias']
  out = messages @ params['out']['kernel'] + params['out']['bias']
  return out.reshape(grid.shape)


@pytest.mark.parametrize('inner', [None, 12])
def test_each_image_has_the_stripes_it_chose(grid, inner):
  _, apply, variables = made(inner=inner)
  messages, told = apply(variables, grid, None)
  chex.assert_shape(told['widths'], (5, 3))
  stripes = np.asarray(told['stripe'])
  np.testing.assert_array_equal(
    stripes, np.array([1, 2, 4])[np.argmax(told['widths'], axis=1)]
  )
  assert len(set(stripes.tolist())) > 1, 'the images must choose differently'
  for i, stripe in enumerate(stripes):
    expected = reference(variables['params'], grid[i], stripe)
    np.testing.assert_allclose(messages[i], expected, atol=3e-5)
  np.testing.assert_array_equal(told['grid'], (4, 6))


def test_an_image_is_the_same_in_any_batch(grid):
  _, apply, variables = made()
  messages, told = apply(variables, grid, None)
  for i in (0, 4):
    alone, alone_told = apply(variables, grid[i : i + 1], None)
    np.testing.assert_allclose(alone[0], messages[i], rtol=1e-5, atol=5e-6)
    assert alone_told['stripe'][0] == told['stripe'][i]
  others = grid.at[1:].set(-grid[1:])
  changed, _ = apply(variables, others, None)
  np.testing.assert_allclose(changed[0], messages[0], rtol=1e-5, atol=5e-6)


def test_one_trace_serves_all_choices(grid):
  module, _, variables = made()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def run(grid):
    messages, told = module.apply(variables, grid)
    return messages, told['stripe']

  chosen = {tuple(run(scale * grid)[1].tolist()) for scale in (1, -2, 0.3)}
  assert len(chosen) > 1


def test_training_mixes_two_neighbours_and_learns_the_width(grid):
  module, apply, variables = made()
  key = jax.random.key(3)
  mixed, _ = apply(variables, grid, {'dropout': key})
  plain, _ = apply(variables, grid, None)
  other, _ = apply(variables, grid, {'dropout': jax.random.key(4)})
  assert np.abs(mixed - plain).max() > 1e-3
  assert np.abs(mixed - other).max() > 1e-3
  # A small temperature leaves one width: the mixture is one of the choices.
  cold = CrossWindowAttention(HEADS, (1, 2, 4), temperature=1e-4)
  sharp, _ = jax.jit(lambda g: cold.apply(variables, g, rngs={'dropout': key}))(
    grid
  )
  for i in range(len(grid)):
    distance = [
      np.abs(sharp[i] - reference(variables['params'], grid[i], w)).max()
      for w in (1, 2, 4)
    ]
    assert min(distance) < 1e-3

  @jax.jit
  @jax.grad
  def gradient(params):
    messages, _ = module.apply({'params': params}, grid, rngs={'dropout': key})
    return jnp.sum(messages**3)

  chex.assert_tree_all_finite(gradient(variables['params']))
  for leaf in jax.tree.leaves(gradient(variables['params'])):
    assert np.abs(leaf).max() > 0


def test_what_a_narrower_stripe_loses_is_measured(grid):
  module, apply, variables = made()
  key = {'dropout': jax.random.key(3)}
  _, told = apply(variables, grid, key)
  assert 'lost' not in apply(variables, grid, None)[1]
  for i, image in enumerate(grid):
    found = [attended(variables['params'], image, w)[0] for w in (1, 2, 4)]
    lost = [np.sum((x - found[-1]) ** 2) for x in found]
    expected = lost / np.sum(found[-1] ** 2)
    np.testing.assert_allclose(told['lost'][i], expected, rtol=1e-3, atol=1e-7)

  def total(name, params):
    _, told = module.apply({'params': params}, grid, rngs=key)
    return jnp.sum(told[name] ** 2)

  def learns(name):
    gradient = jax.jit(jax.grad(functools.partial(total, name)))
    for of, leaves in gradient(variables['params']).items():
      for leaf in jax.tree.leaves(leaves):
        if np.any(leaf):
          yield of

  assert not set(learns('lost'))
  assert set(learns('widths')) == {'width'}


def test_who_loses_more_by_narrow_stripes_begins_wider(grid):
  _, apply, variables = made()
  # Without what the network adds.
  silent = jax.tree.map(jnp.zeros_like, variables['params']['width'])
  params = {**variables['params'], 'width': silent}
  _, told = apply({'params': params}, grid, None)
  places, wanted = spread_places(4, 6, ASKED), []
  for image in grid:
    found = [attended(params, image, w)[0][places] for w in (1, 2, 4)]
    lost = [np.sum((x - found[-1]) ** 2) for x in found[:-1]]
    lost = np.array(lost) / np.sum(found[-1] ** 2)
    wanted.append(np.mean(np.log(lost + 1e-3)))
  expected = np.asarray(told['widths']) @ np.array([1.0, 2.0, 4.0])
  np.testing.assert_array_equal(np.argsort(expected), np.argsort(wanted))


@pytest.mark.parametrize('side', [(3, 5), (12, 12), (9, 30), (32, 32)])
def test_places_are_spread_over_rows_and_columns(side):
  places = spread_places(*side, 16)
  assert len(set(places)) == len(places) == min(16, math.prod(side))
  for size, lines in zip(side, np.unravel_index(places, side), strict=True):
    counts = np.bincount(lines, minlength=size)
    fair = len(places) / size
    assert counts.max() <= math.ceil(fair) + 1
    # No long part of a side is left out.
    assert np.diff(np.flatnonzero(counts)).max() <= max(2, 3 / fair)


def test_the_breadth_is_what_was_chosen_and_learns_as_what_is_expected(grid):
  # The grid is narrower than the widest stripe, and counts its own width.
  module, apply, variables = made(widths=(1, 2, 8))
  _, told = apply(variables, grid, None)
  stripes = np.minimum(np.asarray(told['stripe']), 6)
  np.testing.assert_allclose(told['breadth'], stripes / 6, rtol=1e-6)

  def total(name, params):
    _, told = module.apply({'params': params}, grid)
    shares = told['widths'] @ (jnp.array([1.0, 2.0, 6.0]) / 6)
    return jnp.sum({**told, 'expected': shares}[name])

  found, expected = (
    jax.jit(jax.grad(functools.partial(total, name)))(variables['params'])
    for name in ('breadth', 'expected')
  )
  chex.assert_trees_all_close(found, expected, rtol=1e-5)
  assert any(map(np.any, jax.tree.leaves(found['width'])))


def test_without_a_key_the_gradient_is_that_of_the_chosen_width(grid):
  module, _, variables = made()
  single = CrossWindowAttention(HEADS, (2,))
  fixed = {k: v for k, v in variables['params'].items() if k != 'width'}
  stripes = module.apply(variables, grid)[1]['stripe']

  def total(module, params, images):
    return jnp.sum(module.apply({'params': params}, images)[0] ** 3)

  chosen = np.flatnonzero(np.asarray(stripes) == 2)
  assert len(chosen)
  images = grid[chosen]
  found = jax.jit(jax.grad(functools.partial(total, module)))(
    variables['params'], images
  )
  expected = jax.jit(jax.grad(functools.partial(total, single)))(fixed, images)
  for name in fixed:
    chex.assert_trees_all_close(found[name], expected[name], rtol=1e-4)


def test_a_single_width_makes_no_network(grid):
  module, apply, variables = made(widths=(2,))
  assert 'width' not in variables['params']
  _, told = apply(variables, grid, {'dropout': jax.random.key(0)})
  np.testing.assert_array_equal(told['stripe'], np.full(5, 2))
  np.testing.assert_array_equal(told['widths'], np.ones((5, 1)))
  assert not {'breadth', 'lost'} & set(told)
  del module


def test_directions_without_heads_are_left_out(grid):
  module, apply, variables = made(heads=(2, 2, 0, 0), widths=(1,))
  changed = grid.at[:, 3, 5].add(1.0)
  before, _ = apply(variables, grid, None)
  after, _ = apply(variables, changed, None)
  moved = np.abs(after - before).max(axis=(0, 3)) > 1e-6
  expected = np.zeros((4, 6), bool)
  expected[3], expected[:, 5], expected[2:, 4:] = True, True, True
  np.testing.assert_array_equal(moved, expected)
  del module


@pytest.mark.parametrize(
  ('heads', 'widths', 'message'),
  [
    ((2, 2), (1,), 'one number of heads'),
    ((0, 0, 0, 0), (1,), 'not all zero'),
    (HEADS, (), 'at least one width'),
    ((1, 1, 1, 0), (1,), 'must divide'),
  ],
)
def test_bad_fields_are_named(heads, widths, message, unchecked):
  with pytest.raises(ValueError, match=message):
    CrossWindowAttention(heads, widths).init(
      jax.random.key(0), jnp.zeros((1, 2, 2, 8))
    )
