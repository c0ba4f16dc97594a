"""Tests of `msba_jax.metrics.correspondence`."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.metrics.correspondence import correspondence_score, soft_argmax


def peak_of(scores, radius, temperature):
  """The soft-argmax of one map, in float64, cell by cell."""
  height, width = scores.shape
  y0, x0 = divmod(int(np.argmax(scores)), width)
  total, place = 0.0, np.zeros(2)
  for y in range(height):
    for x in range(width):
      if abs(y - y0) <= radius and abs(x - x0) <= radius:
        weight = np.exp((scores[y, x] - scores.max()) / temperature)
        total += weight
        place += weight * np.array([y, x])
  return place / total


def feature_at(grid, point, size):
  """Bilinear, in float64; beyond the middles of the outer cells, the edge."""
  place = point / size * grid.shape[:2] - 0.5
  place = np.clip(place, 0, np.array(grid.shape[:2]) - 1)
  feature = 0.0
  for y in range(grid.shape[0]):
    for x in range(grid.shape[1]):
      share = np.maximum(1 - np.abs(place - (y, x)), 0).prod()
      feature = feature + share * grid[y, x]
  return feature


def found_share(source, target, points, goals, size, radius, temperature):
  """The share of points of one pair that are found, in float64."""
  hits = []
  for point, goal in zip(points, goals, strict=True):
    feature = feature_at(source, point, size)
    cosines = (target @ feature) / (
      np.linalg.norm(target, axis=-1) * np.linalg.norm(feature)
    )
    place = peak_of(cosines, radius, temperature)
    place = (place + 0.5) / target.shape[:2] * size
    hits.append(np.linalg.norm(place - goal) <= 0.1 * max(size))
  return np.mean(hits)


@hypothesis.given(
  shape=st.sampled_from([(1, 1), (3, 5), (12, 12)]),
  radius=st.sampled_from([0, 1, 5]),
  temperature=st.sampled_from([0.02, 1.0]),
  seed=st.integers(0, 99),
)
def test_soft_argmax_equals_the_reference(shape, radius, temperature, seed):
  scores = np.random.default_rng(seed).uniform(-1, 1, (2, *shape))
  found = soft_argmax(
    jnp.asarray(scores, jnp.float32), radius=radius, temperature=temperature
  )
  expected = [peak_of(s, radius, temperature) for s in scores]
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_soft_argmax_is_the_peak_without_a_window(rng):
  scores = rng.normal(size=(4, 6, 7)).astype('f4')
  found = soft_argmax(jnp.asarray(scores), radius=0)
  flat = scores.reshape(4, -1).argmax(axis=1)
  np.testing.assert_array_equal(found, np.stack([flat // 7, flat % 7], 1))


def test_what_is_far_from_the_peak_has_no_say():
  scores = np.zeros((1, 20), 'f4')
  scores[0, 3] = 1
  alone = soft_argmax(jnp.asarray(scores), temperature=1.0)
  scores[0, 15] = 0.999
  np.testing.assert_array_equal(
    soft_argmax(jnp.asarray(scores), temperature=1.0), alone
  )


def test_correspondence_equals_the_reference(rng, variant):
  size = (40, 60)
  source = rng.normal(size=(3, 4, 6, 5)).astype('f4')
  target = np.roll(source, 1, axis=2) + 0.3 * rng.normal(
    size=source.shape
  ).astype('f4')
  points = rng.uniform((0, 0), size, (3, 20, 2)).astype('f4')
  goals = np.clip(points + np.array([0, 10]), 0, size).astype('f4')
  found = variant(
    lambda *a: correspondence_score(*a, size=size, radius=2, temperature=0.1)
  )(*map(jnp.asarray, (source, target, points, goals)))
  expected = [
    found_share(*(x.astype(np.float64) for x in pair), size, 2, 0.1)
    for pair in zip(source, target, points, goals, strict=True)
  ]
  assert 0.1 < np.mean(expected) < 0.9
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_grids_may_be_of_other_sizes(rng):
  coarse = rng.normal(size=(2, 4, 4, 6)).astype('f4')
  fine = np.repeat(np.repeat(coarse, 3, axis=1), 3, axis=2)
  points = (8 * rng.integers(0, 4, (2, 15, 2)) + 4).astype('f4')
  found = correspondence_score(
    jnp.asarray(coarse),
    jnp.asarray(fine),
    *map(jnp.asarray, (points, points)),
    size=(32, 32),
  )
  np.testing.assert_array_equal(found, 1)


def test_masked_points_do_not_count(rng):
  grid = jnp.asarray(rng.normal(size=(2, 8, 8, 16)), jnp.float32)
  points = jnp.asarray(rng.uniform(0, 32, (2, 6, 2)), jnp.float32)
  goals = points.at[:, 3:].set(-100.0)
  mask = jnp.arange(6) < 3
  mask = jnp.stack([mask, jnp.zeros(6, bool)])
  found = correspondence_score(
    grid, grid, points, goals, size=(32, 32), mask=mask
  )
  np.testing.assert_array_equal(found, [1, np.nan])


def test_random_features_find_what_chance_finds(rng):
  grids = jnp.asarray(rng.normal(size=(2, 100, 10, 10, 32)), jnp.float32)
  points = jnp.asarray(rng.uniform(0, 64, (100, 20, 2)), jnp.float32)
  found = correspondence_score(*grids, points, points, size=(64, 64), radius=0)
  # A disc of a tenth of the side is three per cent of the picture.
  assert 0.01 < float(found.mean()) < 0.05


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: soft_argmax(jnp.zeros((0, 3))), 'must have cells'),
    (lambda: soft_argmax(jnp.zeros((2, 3)), radius=-1), 'radius=-1'),
    (lambda: soft_argmax(jnp.zeros((2, 3)), temperature=0.0), 'temperature='),
    (
      lambda: correspondence_score(
        *(jnp.zeros((1, 2, 2, 1)),) * 2,
        *(jnp.zeros((1, 1, 2)),) * 2,
        size=(4, 4),
        alpha=0.0,
      ),
      'alpha=0.0',
    ),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
