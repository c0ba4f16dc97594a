"""Grids that are mixed and cut to regions."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.cross_window_regions import (
  CrossWindowRegions,
  GridAttention,
)
from msba_jax.models.cross_windows import CrossWindowAttention
from msba_jax.models.sparse_attention import SparseAttention

STRIPES = functools.partial(CrossWindowAttention, (1, 1, 0, 0), (1, 2))
SPARSE = functools.partial(SparseAttention, 2, 2, (0.5, 1.0))
DENSE = functools.partial(GridAttention, 2)


@pytest.fixture
def levels(rng):
  """Grids of 8 × 6 and 4 × 2 tokens of three images."""
  shapes = (3, 8, 6, 5), (3, 4, 2, 6)
  return tuple(jnp.asarray(rng.normal(size=x), jnp.float32) for x in shapes)


def run(module, levels):
  """Regions, what is told, and the parameters."""
  found, variables = jax.jit(module.init_with_output)(jax.random.key(0), levels)
  return *found, variables['params']


def test_regions_of_every_level_and_what_mixers_tell(levels):
  module = CrossWindowRegions(8, (STRIPES, SPARSE), parts=2)
  regions, told, params = run(module, levels)
  chex.assert_shape(regions, (2, 3, 4, 8))
  np.testing.assert_allclose(jnp.mean(regions, axis=-1), 0, atol=1e-5)
  chex.assert_shape(told['stripe'], (2, 3))
  np.testing.assert_array_equal(told['grid'], [[8, 6], [4, 2]])
  # The coarse grid attends densely.
  chex.assert_shape(told['kept'], (1, 3))
  np.testing.assert_array_equal(told['cut'], [[4, 3]])
  chex.assert_shape(told['blocks'], (1, 3, 2, 12, 12))
  assert params.keys() == {'level_0', 'level_1'}
  # Regions of two levels differ in number.
  square = jnp.ones((3, 8, 8, 4))
  _, told, _ = run(module, (square, *levels))
  chex.assert_shape(told['kept'], (2, 3))
  assert [x.shape for x in told['blocks']] == [
    (3, 2, 16, 16),
    (3, 2, 12, 12),
  ]


def test_scales_are_averages_of_the_grid(levels):
  """The second scale is the first scale of a grid that was averaged before."""
  # Sixty-fourths have averages without rounding, in whatever order.
  fine = jnp.round(64 * levels[0]) / 64
  module = CrossWindowRegions(8, (DENSE,), parts=2, scales=(1, 2))
  regions, told, params = run(module, (fine,))
  chex.assert_shape(regions, (2, 3, 4, 8))
  assert not told
  coarse = fine.reshape(3, 4, 2, 3, 2, 5).mean(axis=(2, 4))
  alone = CrossWindowRegions(8, (DENSE,), parts=2)
  expected, _ = jax.jit(alone.apply)(
    {'params': {'level_0': params['level_1']}}, (coarse,)
  )
  np.testing.assert_allclose(regions[1], expected[0], atol=2e-6)


def test_grid_attention_is_attention_of_its_tokens(levels, rng):
  """In float64, all tokens."""
  module = GridAttention(2)
  grid = jnp.asarray(rng.normal(size=(2, 3, 2, 4)), jnp.float32)
  (found, told), variables = jax.jit(module.init_with_output)(
    jax.random.key(1), grid
  )
  params = jax.tree.map(
    lambda x: np.asarray(x, np.float64), variables['params']['attention']
  )
  tokens = np.asarray(grid, np.float64).reshape(2, 6, 4)
  qkv = tokens @ params['qkv']['kernel'] + params['qkv']['bias']
  parts = qkv.reshape(2, 6, 3, 2, 2)
  scores = np.einsum('nthd,nshd->nhts', parts[:, :, 0], parts[:, :, 1])
  weights = np.exp(scores / np.sqrt(2))
  weights /= weights.sum(axis=-1, keepdims=True)
  message = np.einsum('nhts,nshd->nthd', weights, parts[:, :, 2])
  expected = message.reshape(2, 6, 4) @ params['out']['kernel']
  expected = expected + params['out']['bias']
  np.testing.assert_allclose(found.reshape(2, 6, 4), expected, atol=1e-5)
  assert not told
  del levels


def test_mixers_are_side_by_side(levels):
  """Each reads the same tokens, and its messages are added."""
  module = CrossWindowRegions(8, (DENSE, STRIPES), parts=2)
  _, _, params = run(module, levels)

  def tokens(kept):
    """Those that the feed-forward gets, with some mixers silenced."""
    level = dict(params['level_0'])
    for i in {0, 1} - kept:
      silent = jax.tree.map(jnp.zeros_like, level[f'mixer_{i}'])
      level[f'mixer_{i}'] = silent
    found = {}

    def note(forward, arguments, options, context):
      if context.module.name == 'norm_feed_forward':
        found['tokens'] = arguments[0]
      return forward(*arguments, **options)

    with nn.intercept_methods(note):
      module.apply({'params': params | {'level_0': level}}, levels[:1])
    return found['tokens']

  none, first, second, both = map(tokens, [set(), {0}, {1}, {0, 1}])
  for one in (first, second):
    assert np.abs(one - none).max() > 1e-3
  np.testing.assert_allclose(both - none, first + second - 2 * none, atol=1e-5)


def test_an_image_does_not_see_another(levels):
  module = CrossWindowRegions(8, (STRIPES, SPARSE), parts=2)
  regions, _, params = run(module, levels)
  apply = jax.jit(lambda x: module.apply({'params': params}, x)[0])
  changed = tuple(x.at[1].set(3.0) for x in levels)
  np.testing.assert_allclose(apply(changed)[:, ::2], regions[:, ::2], atol=1e-5)
  alone = tuple(x[2:] for x in levels)
  np.testing.assert_allclose(apply(alone)[:, 0], regions[:, 2], atol=1e-5)
