"""Tests of `msba_jax.data.corruptions`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.data import corruptions

KEY = jax.random.key(0)


@pytest.fixture
def photo():
  """Something smooth with an edge, neither black nor white."""
  y, x = np.mgrid[:32, :32] / 31
  image = np.stack([60 + 60 * x, 80 + 40 * y, 70 + 60 * (x > y)], axis=-1)
  return jnp.asarray(image, jnp.uint8)


def damaged(name, image, severity):
  """One corruption, compiled."""
  function = corruptions.CORRUPTIONS[name]
  run = jax.jit(functools.partial(function, severity=severity))
  return np.asarray(run(KEY, jnp.asarray(image)))


@pytest.mark.parametrize('name', corruptions.CORRUPTIONS)
def test_damage_grows_with_severity(photo, name):
  function = corruptions.CORRUPTIONS[name]
  run = jax.jit(
    lambda image: [
      function(KEY, image, severity=s) for s in corruptions.SEVERITIES
    ]
  )
  results = np.asarray(run(photo))
  assert results.shape == (5, *photo.shape)
  assert results.dtype == np.uint8
  difference = np.abs(results.astype(float) - np.asarray(photo, float))
  damage = difference.mean((1, 2, 3))
  assert damage[0] > 0
  assert all(a < b for a, b in itertools.pairwise(damage)), damage


@pytest.mark.parametrize('name', corruptions.CORRUPTIONS)
def test_a_batch_compiled_equals_one_by_one(photo, name):
  function = functools.partial(corruptions.CORRUPTIONS[name], severity=3)
  keys = jax.random.split(KEY, 3)
  batch = jax.jit(jax.vmap(function, in_axes=(0, None)))(keys, photo)
  alone = np.asarray(jax.jit(function)(keys[1], photo), int)
  assert np.abs(np.asarray(batch[1], int) - alone).max() <= 1  # rounding
  differ = len(np.unique(np.asarray(batch), axis=0)) > 1
  assert differ == (name in ('gaussian_noise', 'occlusion'))


@pytest.mark.parametrize('name', corruptions.CORRUPTIONS)
@pytest.mark.parametrize('severity', [0, 6])
def test_there_are_five_severities(photo, name, severity):
  with pytest.raises(ValueError, match=f'severity={severity} must be one of'):
    corruptions.CORRUPTIONS[name](KEY, photo, severity=severity)


def test_values_against_numpy(photo):
  image = np.asarray(photo, np.float64)
  contrast = damaged('contrast', photo, 2)
  mean = image.mean((0, 1))
  np.testing.assert_allclose(contrast, mean + (image - mean) / 2, atol=0.51)
  bright = damaged('brightness', photo, 1)
  np.testing.assert_allclose(bright, np.minimum(image + 25.5, 255), atol=0.51)
  grey = np.full((64, 64, 3), 128, np.uint8)
  noise = damaged('gaussian_noise', grey, 2).astype(float)
  np.testing.assert_allclose(noise.std(), 0.08 * 255, rtol=0.03)
  covered = damaged('occlusion', np.zeros((32, 32, 3), np.uint8), 5)
  np.testing.assert_allclose(
    (np.asarray(covered) == 127).mean(), 0.5, atol=0.05
  )


def test_blur_is_a_normalised_gaussian():
  image = np.zeros((41, 41, 3), np.uint8)
  image[20, 20] = 255
  result = damaged('gaussian_blur', image, 4)
  sigma = 0.036 * 41
  offsets = np.arange(-20, 21)
  kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
  kernel /= kernel.sum()
  expected = 255 * kernel[:, None] * kernel[None, :]
  np.testing.assert_allclose(result[..., 0], expected, atol=0.6)
  flat = np.full((16, 16, 3), 77, np.uint8)
  np.testing.assert_array_equal(damaged('gaussian_blur', flat, 5), flat)
