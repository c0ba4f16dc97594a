"""Tests of `msba_jax.metrics.ridge`."""

import numpy as np
import pytest

from msba_jax.metrics.ridge import ridge_map


def test_equals_the_closed_form(rng):
  x, y = rng.normal(size=(30, 4)) + 2, rng.normal(size=(30, 3))
  found = ridge_map(x, y, ridges=[0.05])
  centred = x - x.mean(axis=0)
  gram = centred.T @ centred
  penalty = 0.05 * np.linalg.norm(gram, 2) * np.eye(4)
  kernel = np.linalg.solve(gram + penalty, centred.T @ (y - y.mean(axis=0)))
  np.testing.assert_allclose(found.kernel, kernel, rtol=1e-9)
  new = rng.normal(size=(2, 5, 4))
  np.testing.assert_allclose(
    found(new), (new - x.mean(axis=0)) @ kernel + y.mean(axis=0), rtol=1e-9
  )


def test_the_penalty_has_the_least_error_with_one_left_out(rng):
  x = rng.normal(size=(25, 20))
  y = x[:, :2] + 2 * rng.normal(size=(25, 2))
  ridges = (1e-4, 1e-2, 1.0)
  found = ridge_map(x, y, ridges=ridges)
  largest = np.linalg.norm((x - x.mean(axis=0)).T @ (x - x.mean(axis=0)), 2)
  errors = []
  for ridge in ridges:
    error = 0.0
    for i in range(25):
      kept = np.arange(25) != i
      # The mean and the strength of the penalty are those of all others.
      centre, offset = x[kept].mean(axis=0), y[kept].mean(axis=0)
      z = x[kept] - centre
      kernel = np.linalg.solve(
        z.T @ z + ridge * largest * np.eye(20), z.T @ (y[kept] - offset)
      )
      error += np.sum((y[i] - offset - (x[i] - centre) @ kernel) ** 2)
    errors.append(error)
  assert found.ridge == ridges[int(np.argmin(errors))]
  assert found.ridge > 1e-4


def test_more_features_than_rows(rng):
  x, y = rng.normal(size=(6, 40)), rng.normal(size=(6, 2))
  found = ridge_map(x, y, ridges=[1e-9])
  np.testing.assert_allclose(found(x), y, atol=1e-6)


def test_inputs_that_never_change_map_to_the_mean(rng):
  y = rng.normal(size=(5, 2))
  found = ridge_map(np.ones((5, 3)), y)
  np.testing.assert_allclose(found(np.ones((1, 3)))[0], y.mean(axis=0))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((np.ones((1, 2)), np.ones((1, 2))), 'two rows'),
    ((np.ones((3, 2)), np.ones((2, 2))), 'as many'),
    ((np.full((3, 2), np.inf), np.ones((3, 2))), 'not finite'),
    ((np.ones((3, 2)), np.ones((3, 2)), (0.0,)), 'above 0'),
  ],
)
def test_errors(arguments, message, unchecked):
  with pytest.raises(ValueError, match=message):
    ridge_map(*arguments[:2], ridges=(*arguments[2:], (1.0,))[0])
