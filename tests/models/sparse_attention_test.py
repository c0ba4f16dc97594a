"""Regions that choose regions, and how many."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.sparse_attention import (
  SparseAttention,
  cell_side,
  region_side,
)
from tests.models.conftest import perturbed

RATIOS = (1 / 4, 1 / 2, 1.0)


@functools.cache
def made(dense=False, ratios=RATIOS, means=True, width=None):
  """The module, a compiled apply, and parameters without special values."""
  module = SparseAttention(
    2, 2, ratios, means=means, dense=dense, qkv_features=width
  )
  variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 6, 8, 8)))
  apply = jax.jit(lambda v, grid, rngs: module.apply(v, grid, rngs=rngs))
  variables = perturbed(variables, 0.3)
  # Choices that depend on the rows, and not on a bias.
  if 'ratio' in variables['params']:
    outer = variables['params']['ratio']['network']['outer']
    outer['kernel'] = outer['kernel'] - outer['kernel'].mean(
      axis=0, keepdims=True
    )
    outer['bias'] = jnp.zeros_like(outer['bias'])
  return module, apply, variables


@pytest.fixture
def grid(rng):
  """Five grids of six rows and eight columns: twelve regions of four tokens."""
  scale = np.array([0.2, 1.0, 2.0, 4.0, 0.5]).reshape(5, 1, 1, 1)
  return jnp.asarray(scale * rng.normal(size=(5, 6, 8, 8)), jnp.float32)


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense_weights(query, keys, means):
  """Of a query, by head and region: weights (h, j, t), and of the means."""
  found = []
  for part in np.split(np.arange(len(query)), 2):
    scored = keys[..., part] @ query[part] / np.sqrt(len(part))
    averaged = scored.mean(axis=1) if means else np.full(len(scored), -np.inf)
    total = np.exp(scored).sum()
    found.append((np.exp(scored) / total, np.exp(averaged) / total))
  return [np.stack(x) for x in zip(*found, strict=True)]


def importance(parts, means):
  """What each head chooses regions by (h, i, j); without means all do alike."""
  averages = parts.mean(axis=1)
  if not means:
    together = averages[:, 0] @ averages[:, 1].T / np.sqrt(averages.shape[-1])
    return np.stack([together, together])
  rows = []
  for average in averages:
    weights, of_means = dense_weights(average[0], parts[:, :, 1], means)
    rows.append(weights.sum(-1) - 4 * of_means)
  # What float32 does not tell apart from nothing is a tie, here as there.
  return np.log((np.stack(rows, axis=1) + 1e-4).astype(np.float32))


def chosen_regions(params, scores):
  """Which regions (h, i, j) rows of scores keep."""
  kept = np.zeros(scores.shape, bool)
  count = scores.shape[-1]
  for head, i in np.ndindex(*scores.shape[:2]):
    row = scores[head, i]
    weights = np.exp(row - row.max())
    weights = weights / weights.sum()
    entropy = -(weights * np.log(weights)).sum() / np.log(count)
    told = np.array(
      [
        np.log((entropy + 1e-4) / (1 - entropy + 1e-4)) / 2 - 1,
        np.log(row.max() - row.mean() + 1e-3),
        np.log(row.std() + 1e-3),
      ]
    )
    network = params['ratio']['network']
    inner = network['inner'], network['outer']
    hidden = gelu(told @ inner[0]['kernel'] + inner[0]['bias'])
    away = 10 * (hidden @ inner[1]['kernel'] + inner[1]['bias']).item()
    # Octaves of the ratios: -2, -1 and 0; half an octave more on either side.
    away = away + (entropy - 1) * np.log2(count) + 1
    wanted = 1.5 * np.tanh(away / 1.5) - 1
    nearest = np.argmin(np.abs(np.log2(RATIOS) - wanted))
    keep = int(np.ceil(RATIOS[nearest] * count - 1e-9))
    order = [i] + [j for j in np.argsort(-row, kind='stable') if j != i]
    kept[head, i, order[:keep]] = True
  return kept


def reference(params, grid, means):
  """Messages of one image in float64, what is kept, and the divergence."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  height, width, _ = grid.shape
  qkv = np.asarray(grid, np.float64) @ params['qkv']['kernel']
  qkv = (qkv + params['qkv']['bias']).reshape(height, width, 3, -1)
  regions = [
    [(y + i, x + j) for i in (0, 1) for j in (0, 1)]
    for y in range(0, height, 2)
    for x in range(0, width, 2)
  ]
  parts = np.array([[qkv[at] for at in region] for region in regions])
  kept = chosen_regions(params, importance(parts, means))
  messages = np.zeros((height, width, qkv.shape[-1]))
  divergence = []
  for i, region in enumerate(regions):
    for place, at in enumerate(region):
      weights, averages = dense_weights(
        parts[i, place, 0], parts[:, :, 1], means
      )
      weights = np.where(kept[:, i, :, None], weights, averages[..., None])
      masses = weights.sum(axis=(1, 2))
      weights = weights / masses[:, None, None]
      for head, part in enumerate(np.split(np.arange(qkv.shape[-1]), 2)):
        messages[at][part] = np.einsum(
          'jt,jtf->f', weights[head], parts[:, :, 2, part]
        )
      if place == 2:
        # It stands for all; the millionth is of `kept_mass_loss`.
        divergence.append(-np.log((masses + 1e-6) / (1 + 1e-6)))
  out = messages @ params['out']['kernel'] + params['out']['bias']
  return out, kept, np.mean(divergence)


@pytest.mark.parametrize(
  ('means', 'width'), [(True, None), (False, None), (True, 6)]
)
def test_values_and_what_is_told(grid, means, width):
  _, apply, variables = made(means=means, width=width)
  messages, told = apply(variables, grid, None)
  shares, apart = set(), False
  for i in range(len(grid)):
    expected, kept, divergence = reference(variables['params'], grid[i], means)
    np.testing.assert_allclose(messages[i], expected, rtol=5e-5, atol=5e-5)
    np.testing.assert_allclose(told['kept'][i], kept.mean(), atol=1e-6)
    np.testing.assert_allclose(
      told['divergence'][i], divergence, rtol=3e-4, atol=1e-6
    )
    blocks = np.broadcast_to(told['blocks'][i], kept.shape)
    for place in np.ndindex(*kept.shape[:2]):
      names = blocks[place]
      assert set(names[names >= 0].tolist()) == set(np.flatnonzero(kept[place]))
    shares |= set(kept.sum(axis=-1).ravel().tolist())
    apart |= bool(np.any(kept[0] != kept[1]))
  assert len(shares) > 1, 'rows must keep different numbers'
  assert apart == means, 'heads choose by themselves where there are means'
  np.testing.assert_array_equal(told['cut'], (3, 4))


def test_dense_has_the_same_parameters_and_leaves_nothing_out(grid):
  _, apply, variables = made()
  _, dense, other = made(dense=True)
  chex.assert_trees_all_equal_shapes(variables, other)
  whole = made(ratios=(1.0,))[1]
  fixed = {k: v for k, v in variables['params'].items() if k != 'ratio'}
  expected, _ = whole({'params': fixed}, grid, None)
  found, told = dense(variables, grid, None)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  _, of_sparse = apply(variables, grid, None)
  np.testing.assert_array_equal(told['blocks'], of_sparse['blocks'])


def test_the_gradient_of_the_choice_is_lent(grid):
  """The network learns from the messages alone, and the value is untouched."""
  module, apply, variables = made()
  key = jax.random.key(2)

  @jax.jit
  @jax.value_and_grad
  def of_messages(params):
    messages, _ = module.apply({'params': params}, grid, rngs={'dropout': key})
    return jnp.sum(messages**3)

  _, gradients = of_messages(variables['params'])
  chex.assert_tree_all_finite(gradients)
  for leaf in jax.tree.leaves(gradients):
    assert np.abs(leaf).max() > 0

  @jax.jit
  @jax.grad
  def of_shares(params):
    _, told = module.apply({'params': params}, grid)
    return jnp.mean(told['kept'])

  step = of_shares(variables['params'])
  for name, leaves in step.items():
    for leaf in jax.tree.leaves(leaves):
      assert np.any(leaf) == (name == 'ratio'), 'a budget shapes no features'
  step = step['ratio']
  less = jax.tree.map(
    lambda x, g: x - 5 * g, variables['params']['ratio'], step
  )
  _, before = apply(variables, grid, None)
  _, after = apply(
    {'params': variables['params'] | {'ratio': less}}, grid, None
  )
  assert after['kept'].mean() < before['kept'].mean()


def test_an_image_is_the_same_in_any_batch(grid):
  _, apply, variables = made()
  grid = grid / 2  # The bounds are absolute, and rounding grows with values.
  messages, _ = apply(variables, grid, None)
  alone, _ = apply(variables, grid[3:4], None)
  np.testing.assert_allclose(alone[0], messages[3], rtol=1e-5, atol=2e-5)
  changed, _ = apply(variables, grid.at[0].set(7.0), None)
  np.testing.assert_allclose(changed[1:], messages[1:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('means', [True, False])
def test_what_is_left_out_has_influence_by_its_mean_alone(grid, means):
  _, apply, variables = made(ratios=(1 / 4,), means=means)
  before, told = apply(variables, grid[:1], None)
  blocks = np.asarray(told['blocks'][0, :, 0])
  unseen = set(range(12)) - set(blocks.ravel().tolist())
  region = unseen.pop()
  y, x = 2 * (region // 4), 2 * (region % 4)
  # Two tokens change and the mean of the region does not: too little to be
  # chosen for it.
  moved = grid[:1].at[0, y, x, 0].add(0.05).at[0, y, x + 1, 0].add(-0.05)
  after, other = apply(variables, moved, None)
  np.testing.assert_array_equal(other['blocks'][0, :, 0], blocks)
  np.testing.assert_allclose(after[0, :2, :2], before[0, :2, :2], atol=1e-6)
  assert np.abs(after - before).max() > 1e-4
  shifted = grid[:1].at[0, y : y + 2, x : x + 2, 0].add(0.05)
  after, other = apply(variables, shifted, None)
  np.testing.assert_array_equal(other['blocks'][0, :, 0], blocks)
  change = np.abs(after[0, :2, :2] - before[0, :2, :2]).max()
  assert change > 1e-4 if means else change < 1e-6


def test_regions_tile_any_grid():
  assert region_side(12, 12, 4) == 4
  assert region_side(6, 12, 4) == 2
  assert region_side(7, 5, 4) == 1
  # There is something to choose.
  assert region_side(16, 16, 8) == 4
  assert region_side(8, 8, 8) == 2
  assert region_side(3, 3, 3) == 1
  assert region_side(2, 2, 4) == 1
  assert region_side(1, 1, 4) == 1


def test_cells_tile_a_region():
  found = [cell_side(region) for region in range(1, 10)]
  assert found == [1, 2, 3, 4, 5, 3, 7, 4, 3]


def test_cells_have_means_of_their_own(rng):
  """Exact where the tokens of every cell of 4 × 4 are equal."""
  cells = rng.normal(size=(1, 6, 6, 8))
  grid = jnp.asarray(cells.repeat(4, axis=1).repeat(4, axis=2), jnp.float32)
  sparse, dense = (
    SparseAttention(2, 8, (1 / 9,), dense=dense) for dense in (False, True)
  )
  variables = perturbed(sparse.init(jax.random.key(0), grid), 1.0)
  (found, told), (expected, _) = (
    x.apply(variables, grid) for x in (sparse, dense)
  )
  np.testing.assert_array_equal(told['cut'], (3, 3))
  np.testing.assert_allclose(told['kept'], 1 / 9, rtol=1e-6)
  np.testing.assert_allclose(told['divergence'], 0, atol=1e-5)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  # As it is not where cells are not.
  moved = jnp.roll(grid, 2, axis=(1, 2))
  (found, told), (expected, _) = (
    x.apply(variables, moved) for x in (sparse, dense)
  )
  assert told['divergence'].item() > 1e-3
  assert np.abs(found - expected).max() > 1e-2


def test_a_grid_whose_regions_are_single_tokens_is_dense(rng):
  """Their means would be themselves."""
  grid = jnp.asarray(rng.normal(size=(2, 3, 3, 8)), jnp.float32)
  (messages, told), variables = SparseAttention(2, 4).init_with_output(
    jax.random.key(0), grid
  )
  assert set(variables['params']) == {'qkv', 'out'}
  assert not told
  expected, _ = SparseAttention(2, 4, (1.0,), means=False).apply(
    variables, grid
  )
  np.testing.assert_allclose(messages, expected, atol=1e-6)
  _, told = SparseAttention(2, 4, (1 / 4,), means=False).apply(variables, grid)
  np.testing.assert_allclose(told['kept'], 3 / 9)


@pytest.mark.parametrize('ratios', [(), (0.0, 1.0), (0.5, 1.5)])
def test_bad_ratios_are_named(ratios):
  with pytest.raises(ValueError, match='ratios must lie in'):
    SparseAttention(2, ratios=ratios).init(
      jax.random.key(0), jnp.zeros((1, 2, 2, 4))
    )
