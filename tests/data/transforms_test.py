"""Tests of `msba_jax.data.transforms`."""

import colorsys
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.data import transforms

KEY = jax.random.key(0)
ALL = {
  'flip': transforms.random_flip,
  'crop': functools.partial(transforms.random_crop, padding=3),
  'resized': transforms.random_resized_crop,
  'jitter': functools.partial(transforms.color_jitter, hue=0.1),
  'erasing': functools.partial(transforms.random_erasing, probability=1.0),
}


def many(function, number, image):
  """An augmentation of one image under several keys, compiled once."""
  keys = jax.random.split(KEY, number)
  return np.asarray(jax.jit(jax.vmap(function, in_axes=(0, None)))(keys, image))


def picture(rng, height=12, width=10, dtype=np.uint8):
  return jnp.asarray(rng.integers(0, 256, (height, width, 3)), dtype)


@pytest.mark.parametrize('name', ALL)
def test_an_augmentation_of_a_batch(rng, name):
  images = jnp.stack([picture(rng)] * 6)
  keys = jax.random.split(KEY, 6)
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(1)
  def augment(keys, images):
    return jax.vmap(ALL[name])(keys, images)

  result = augment(keys, images)
  assert result.shape == images.shape
  kept = name in ('flip', 'crop', 'erasing')
  assert result.dtype == (jnp.uint8 if kept else jnp.float32)
  assert result.min() >= 0
  assert result.max() <= 255
  assert len(np.unique(np.asarray(result), axis=0)) > 1  # keys matter
  np.testing.assert_array_equal(result, augment(keys, images))
  turned = augment(keys[::-1], images)  # an image depends on its key alone
  np.testing.assert_allclose(result, turned[::-1], atol=1e-3)


def test_a_flip_mirrors_or_does_nothing(rng):
  image = picture(rng)
  always = transforms.random_flip(KEY, image, probability=1.0)
  np.testing.assert_array_equal(always, np.asarray(image)[:, ::-1])
  never = transforms.random_flip(KEY, image, probability=0.0)
  np.testing.assert_array_equal(never, image)


@pytest.mark.parametrize('mode', ['reflect', 'edge', 'constant'])
def test_a_crop_is_a_window_of_the_padded_image(rng, mode):
  image = np.asarray(picture(rng))
  padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode=mode)
  windows = {
    padded[y : y + 12, x : x + 10].tobytes(): (y, x)
    for y in range(5)
    for x in range(5)
  }
  crop = functools.partial(transforms.random_crop, padding=2, mode=mode)
  results = many(crop, 300, jnp.asarray(image))
  seen = {windows[result.tobytes()] for result in results}
  assert len(seen) == 25  # every shift occurs


def test_a_crop_refuses_impossible_padding(rng):
  with pytest.raises(ValueError, match='padding=10 must be between 0 and 9'):
    transforms.random_crop(KEY, picture(rng), padding=10)


def test_a_resized_crop_of_everything_is_the_image(rng):
  image = picture(rng, 8, 8)
  crop = functools.partial(
    transforms.random_resized_crop, area=(1.0, 1.0), ratio=(1.0, 1.0)
  )
  np.testing.assert_allclose(many(crop, 1, image)[0], image, atol=1e-3)


def test_a_resized_crop_enlarges_what_lies_inside():
  """On a ramp a crop shows a part of the ramp, with a smaller slope."""
  ramp = jnp.asarray(np.mgrid[:64, :64, :3][0], jnp.float32)
  crop = functools.partial(
    transforms.random_resized_crop, area=(0.25, 0.25), ratio=(1.0, 1.0)
  )
  results = many(crop, 20, ramp)
  slopes = np.diff(results[:, 8:-8, 5, 0], axis=1)
  np.testing.assert_allclose(slopes, 0.5, atol=1e-3)
  first = results[:, 8, 0, 0]
  assert first.std() > 3


def test_jitter_by_nothing_is_the_image(rng):
  image = picture(rng)
  still = {'brightness': 0.0, 'contrast': 0.0, 'saturation': 0.0, 'hue': 0.0}
  jitter = functools.partial(transforms.color_jitter, **still)
  result = many(jitter, 1, image)[0]
  np.testing.assert_allclose(result, image, atol=1e-2)


def test_each_jitter_changes_what_it_says(rng):
  image = jnp.asarray(rng.integers(90, 160, (12, 10, 3)), jnp.float32)
  still = {'brightness': 0.0, 'contrast': 0.0, 'saturation': 0.0, 'hue': 0.0}
  luma = np.array([0.299, 0.587, 0.114])

  def jittered(**change):
    options = {**still, **change}
    jitter = functools.partial(transforms.color_jitter, **options)
    return many(jitter, 1, image)[0]

  ratio = jittered(brightness=0.2) / image
  np.testing.assert_allclose(ratio, ratio[0, 0, 0], atol=1e-4)
  contrast = jittered(contrast=0.2)
  np.testing.assert_allclose(
    (contrast @ luma).mean(), (image @ luma).mean(), rtol=1e-4
  )
  for change in ({'saturation': 0.3}, {'hue': 0.05}):
    result = jittered(**change)
    assert np.abs(result - image).max() > 1
    np.testing.assert_allclose(result @ luma, image @ luma, rtol=1e-3)


def test_hue_turns_by_the_angle():
  image = jnp.asarray([[[140.0, 100.0, 100.0]]])

  def hue(pixel):
    return colorsys.rgb_to_hsv(*(np.asarray(pixel)[0, 0] / 255))[0]

  jitter = functools.partial(
    transforms.color_jitter,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.5,
  )
  hues = [hue(pixel) for pixel in many(jitter, 64, image)]
  assert np.histogram(hues, 4, (0, 1))[0].min() > 4


def test_erasing_covers_one_rectangle_of_the_right_size(rng):
  image = jnp.asarray(np.zeros((40, 30, 3), np.uint8))
  erase = functools.partial(
    transforms.random_erasing, probability=1.0, area=(0.1, 0.2), value=9.0
  )
  for covered in many(erase, 50, image)[..., 0] == 9:
    rows, columns = covered.any(1), covered.any(0)
    np.testing.assert_array_equal(covered, rows[:, None] & columns[None, :])
    assert 0.05 < covered.mean() < 0.26
  never = functools.partial(transforms.random_erasing, probability=0.0)
  image = picture(rng)
  np.testing.assert_array_equal(many(never, 1, image)[0], image)


@pytest.mark.parametrize(
  'function', [transforms.random_resized_crop, transforms.random_erasing]
)
@pytest.mark.parametrize('area', [(0.0, 0.5), (0.5, 0.2), (0.5, 1.5)])
def test_ranges_must_make_sense(rng, function, area):
  with pytest.raises(ValueError, match='must lie in'):
    function(KEY, picture(rng), area=area)


def test_jitter_refuses_what_it_cannot_do(rng):
  with pytest.raises(ValueError, match='must not be negative'):
    transforms.color_jitter(KEY, picture(rng), hue=-0.1)
  with pytest.raises(ValueError, match='three channels'):
    transforms.color_jitter(KEY, picture(rng)[..., :1])


def test_composed_functions_follow_each_other_with_their_own_keys(rng):
  image = picture(rng)
  seen = []

  def note(key, image):
    seen.append(np.asarray(jax.random.key_data(key)).tolist())
    return image + 1

  def double(key, image):
    seen.append(np.asarray(jax.random.key_data(key)).tolist())
    return image * 2

  result = transforms.compose(note, double)(KEY, image)
  np.testing.assert_array_equal(result, (image + 1) * 2)
  assert seen[0] != seen[1]
  np.testing.assert_array_equal(transforms.compose()(KEY, image), image)


@pytest.mark.parametrize('lead', [(), (4,), (2, 3)])
def test_normalising(rng, lead):
  images = jnp.asarray(rng.integers(0, 256, (*lead, 5, 6, 3)), jnp.uint8)
  mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
  result = transforms.normalize_image(images, mean=mean, std=std)
  assert result.dtype == jnp.float32
  expected = (np.asarray(images, np.float64) / 255 - mean) / std
  np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize('std', [(1.0,), (1.0, 1.0, 0.0)])
def test_normalising_needs_numbers_per_channel(rng, std):
  with pytest.raises(ValueError, match='std > 0'):
    transforms.normalize_image(picture(rng), mean=(0.5,) * 3, std=std)
