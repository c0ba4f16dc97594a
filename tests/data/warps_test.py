"""Tests of `msba_jax.data.warps`."""

import numpy as np
import pytest

from msba_jax.data.warps import corner_points, perspective, warped_pair


def spots(points, size):
  """A grey picture with a bright round spot at each point."""
  rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
  light = sum(
    np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 4) for y, x in points
  )
  pixels = np.clip(60 + 190 * light, 0, 255).astype(np.uint8)
  return np.repeat(pixels[..., None], 3, axis=2)


@pytest.mark.parametrize('size', [(64, 64), (48, 80)])
def test_what_stood_at_a_point_stands_where_it_is_said_to_be(size):
  place = np.array([0.6, 0.4]) * size
  image = spots([place], size)
  for seed in range(20):
    rng = np.random.default_rng(seed)
    pair = warped_pair(image, rng=rng)
    matrix = perspective(size, rng=np.random.default_rng(seed))
    column, row, scale = matrix @ (place[1], place[0], 1)
    # The middle of what is brighter than the ground and not uncovered.
    weight = pair.target[..., 0].astype(float) - 140
    weight = np.maximum(weight, 0)
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    found = [np.sum(x * weight) / np.sum(weight) for x in (rows, columns)]
    np.testing.assert_allclose(found, [row / scale, column / scale], atol=0.5)


def test_points_are_moved_by_the_same_warp(rng):
  image = rng.integers(0, 256, (40, 60, 3), np.uint8)
  pair = warped_pair(image, rng=np.random.default_rng(3))
  matrix = perspective((40, 60), rng=np.random.default_rng(3))
  for point, goal, visible in zip(*pair[2:], strict=True):
    column, row, scale = matrix @ (point[1], point[0], 1)
    expected = np.array([row / scale, column / scale])
    np.testing.assert_allclose(goal, expected, rtol=1e-5)
    assert visible == ((expected >= 0) & (expected < (40, 60))).all()
  assert 0.5 < pair.visible.mean() < 1


def test_no_warp_changes_nothing(rng):
  image = rng.integers(0, 256, (32, 32, 3), np.uint8)
  pair = warped_pair(
    image, rng=rng, rotation=0.0, zoom=1.0, shift=0.0, tilt=0.0
  )
  np.testing.assert_array_equal(pair.target, image)
  np.testing.assert_array_equal(pair.source_points, pair.target_points)
  assert pair.visible.all()


def test_each_cell_has_its_corner():
  rng = np.random.default_rng(0)
  corners = np.array([(y, x) for y in range(5) for x in range(5)]) * 16
  corners = corners + rng.integers(5, 12, corners.shape) + 0.5
  found = corner_points(spots(corners, (80, 80)), cells=5)
  assert np.abs(found - corners).max() <= 2.5


def test_an_edge_is_no_corner():
  image = np.zeros((30, 30, 3), np.uint8)
  image[:, 10:] = 200
  image[20:, 10:] = 0
  row, column = corner_points(image, cells=1)[0]
  assert abs(row - 20) <= 2.5
  assert abs(column - 10) <= 2.5


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'cells': 0}, 'cells=0'),
    ({'cells': 33}, 'cells=33'),
    ({'zoom': 0.5}, 'zoom=0.5'),
    ({'tilt': 0.5}, 'tilt=0.5'),
  ],
)
def test_errors(arguments, message, rng):
  with pytest.raises(ValueError, match=message):
    warped_pair(np.zeros((32, 32, 3), np.uint8), rng=rng, **arguments)
