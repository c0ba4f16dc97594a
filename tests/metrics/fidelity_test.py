"""Tests of `msba_jax.metrics.fidelity`."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.metrics.fidelity import fidelity


def reference(s, d):
  """The three numbers of one image, from lists of numbers."""
  pairs = list(zip(s.ravel().tolist(), d.ravel().tolist(), strict=True))
  product = sum(x * y for x, y in pairs)
  lengths = sum(x * x for x, _ in pairs) * sum(y * y for _, y in pairs)
  away = sum(abs(x - y) for x, y in pairs)
  return (
    product / lengths**0.5,
    away / sum(abs(y) for _, y in pairs),
    (sum((x - y) ** 2 for x, y in pairs) / len(pairs)) ** 0.5,
  )


@hypothesis.given(
  shape=st.sampled_from([(1, 1), (3, 4), (2, 3, 2, 2)]),
  noise=st.sampled_from([1e-3, 1.0, 100.0]),
  dtype=st.sampled_from([np.float16, np.float32, np.float64]),
  seed=st.integers(0, 99),
)
def test_equals_the_reference(shape, noise, dtype, seed):
  rng = np.random.default_rng(seed)
  dense = rng.normal(size=shape).astype(dtype)
  sparse = (dense + noise * rng.normal(size=shape)).astype(dtype)
  found = fidelity(sparse, dense)
  expected = [
    reference(s, d)
    for s, d in zip(
      sparse.astype(np.float64), dense.astype(np.float64), strict=True
    )
  ]
  np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=1e-9)
  assert all(x.dtype == np.float64 and x.shape == shape[:1] for x in found)


def test_the_same_output_is_perfect(rng):
  dense = rng.normal(size=(3, 5)).astype(np.float32)
  found = fidelity(dense, dense)
  np.testing.assert_allclose(found.cosine, 1)
  np.testing.assert_array_equal(found.relative_l1, 0)
  np.testing.assert_array_equal(found.rmse, 0)


def test_outputs_of_zero(rng):
  numbers = rng.normal(size=3)
  dense = np.stack([np.zeros(3), np.zeros(3), numbers])
  sparse = np.stack([np.zeros(3), numbers, np.zeros(3)])
  found = fidelity(sparse, dense)
  np.testing.assert_array_equal(found.cosine, [1, 0, 0])
  np.testing.assert_array_equal(found.relative_l1, [0, np.inf, 1])
  size = np.sqrt(np.mean(numbers**2))
  np.testing.assert_allclose(found.rmse, [0, size, size])


def test_an_image_does_not_see_the_others(rng):
  sparse, dense = rng.normal(size=(2, 4, 6))
  whole, one = fidelity(sparse, dense), fidelity(sparse[2:3], dense[2:3])
  for a, b in zip(whole, one, strict=True):
    np.testing.assert_array_equal(a[2:3], b)


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize(
  'shapes', [((2, 3), (2, 4)), ((3,), (3,)), ((2, 0), (2, 0))]
)
def test_shapes_that_do_not_fit_are_named(shapes):
  with pytest.raises(ValueError, match='must agree in shape, images first'):
    fidelity(*map(np.zeros, shapes))


@pytest.mark.parametrize('name', ['sparse', 'dense'])
def test_numbers_that_are_not_finite_are_named(rng, name):
  given = {key: rng.normal(size=(2, 3)) for key in ('sparse', 'dense')}
  given[name][1, 2] = np.nan
  with pytest.raises(ValueError, match=f'{name} holds numbers that are not'):
    fidelity(**given)
