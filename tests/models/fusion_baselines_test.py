"""Tests of the plain fusions, and of what all fusions have in common."""

import jax
import numpy as np
import pytest

from msba_jax.models import fusion_baselines, mmfuser
from tests.models.mmfuser_test import (
  GRID,
  applied,
  as_double,
  dense,
  draw,
  refilled,
  softmax,
)

BASELINES = (
  fusion_baselines.ConcatFuser,
  fusion_baselines.AverageFuser,
  fusion_baselines.WeightedFuser,
  fusion_baselines.PyramidFuser,
  fusion_baselines.SumFuser,
)


def pyramid(layers, params):
  total = sum(dense(x, params[f'lateral_{i}']) for i, x in enumerate(layers))
  n, _, d = total.shape
  padded = np.pad(total.reshape(n, *GRID, d), ((0, 0), (1, 1), (1, 1), (0, 0)))
  kernel = params['smooth']['kernel']
  smooth = sum(
    padded[:, i : i + GRID[0], j : j + GRID[1]] @ kernel[i, j]
    for i in range(3)
    for j in range(3)
  )
  return smooth.reshape(n, -1, d) + params['smooth']['bias']


EXPECTED = (
  lambda layers, params: dense(np.concatenate(layers, -1), params['out']),
  lambda layers, _: np.mean(layers, axis=0),
  lambda layers, params: np.tensordot(softmax(params['weights']), layers, 1),
  pyramid,
  lambda layers, _: np.sum(layers, axis=0),
)


@pytest.mark.parametrize(
  ('make', 'expected'),
  list(zip(BASELINES, EXPECTED, strict=True)),
  ids=lambda value: value.__name__,
)
def test_baselines_equal_their_references(variant, rng, make, expected):
  module = make()
  layers = draw(rng)
  variables = refilled(module, layers, rng)
  np.testing.assert_allclose(
    variant(lambda *given: module.apply(*given, grid=GRID))(variables, layers),
    expected([np.asarray(x, np.float64) for x in layers], as_double(variables)),
    atol=1e-5,
  )


@pytest.mark.parametrize(
  'make',
  [lambda: mmfuser.MMFuser(2, 2), *BASELINES],
  ids=lambda make: getattr(make, '__name__', ''),
)
def test_permuting_images_permutes_the_result(rng, make):
  module = make()
  layers = draw(rng, n=3)
  variables = refilled(module, layers, rng)
  order = np.array([2, 0, 1])
  apply = applied(module)
  np.testing.assert_allclose(
    apply(variables, [x[order] for x in layers]),
    apply(variables, layers)[order],
    atol=1e-6,
  )


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize(
  'module', [mmfuser.MMFuser(2), *(make() for make in BASELINES)]
)
def test_every_fusion_checks_its_layers(rng, module):
  layers = draw(rng)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match='6 tokens are no square'):
    module.init(key, layers)
  with pytest.raises(ValueError, match=r'grid=\(2, 4\) does not hold 6'):
    module.init(key, layers, grid=(2, 4))
  with pytest.raises(ValueError, match='all of one shape'):
    module.init(key, [layers[0][..., :4], *layers[1:]], grid=GRID)
  with pytest.raises(ValueError, match='all of one shape'):
    module.init(key, [], grid=GRID)
