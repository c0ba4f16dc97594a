"""Tests of `msba_jax.data.corrupted`."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from msba_jax.data.corrupted import (
  CorruptedSource,
  Corruption,
  choose_corruption,
  corrupt_evaluation,
)
from msba_jax.data.corruptions import CORRUPTIONS
from msba_jax.data.errors import InputError
from msba_jax.data.source import (
  Evaluation,
  Fingerprinted,
  Record,
  Source,
  SubsetSource,
)

NOISE = Corruption('gaussian_noise', 3)


class Photos:
  """Pictures in memory, named, of two classes."""

  class_names = ('ant', 'bee')

  def __init__(self, pictures, root='photos'):
    self.pictures, self._root = pictures, root
    self.labels = np.arange(len(pictures), dtype=np.int32) % 2
    self.ids = tuple(f'{root}/{i}' for i in range(len(pictures)))

  def __len__(self):
    return len(self.pictures)

  def __getitem__(self, index):
    label = int(self.labels[index])
    return Record(image=self.pictures[index], label=label)

  def fingerprint(self):
    return self._root


@pytest.fixture
def photos():
  rng = np.random.default_rng(0)
  return Photos(rng.integers(60, 190, (6, 12, 10, 3)).astype(np.uint8))


def pictures(source):
  return np.stack([source[i]['image'] for i in range(len(source))])


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_pictures_are_damaged_and_nothing_else(photos, name):
  before = photos.pictures.copy()
  damaged = CorruptedSource(photos, Corruption(name, 4))
  assert isinstance(damaged, Source)
  assert isinstance(damaged, Fingerprinted)
  assert len(damaged) == len(photos)
  assert damaged.ids == photos.ids
  assert damaged.class_names == photos.class_names
  np.testing.assert_array_equal(damaged.labels, photos.labels)
  found = pictures(damaged)
  assert found.dtype == np.uint8
  assert found.shape == photos.pictures.shape
  assert np.all(np.any(found != photos.pictures, axis=(1, 2, 3)))
  assert [damaged[i]['label'] for i in range(6)] == photos.labels.tolist()
  np.testing.assert_array_equal(photos.pictures, before)


def test_values_against_numpy(photos):
  damaged = CorruptedSource(photos, Corruption('brightness', 1))
  expected = np.minimum(photos.pictures + 25.5, 255)
  np.testing.assert_allclose(pictures(damaged), expected, atol=0.51)


@pytest.mark.parametrize('name', ['gaussian_noise', 'occlusion'])
def test_damage_depends_on_name_and_seed_alone(photos, name):
  damaged = CorruptedSource(photos, Corruption(name, 3))
  whole = pictures(damaged)
  np.testing.assert_array_equal(pictures(damaged), whole)
  # The same picture elsewhere in another collection, read by several threads.
  order = [4, 2, 5]
  some = CorruptedSource(SubsetSource(photos, order), Corruption(name, 3))
  with ThreadPoolExecutor(3) as pool:
    found = list(pool.map(lambda i: some[i]['image'], range(3)))
  np.testing.assert_array_equal(found, whole[order])
  other = CorruptedSource(photos, Corruption(name, 3), seed=1)
  assert np.any(pictures(other) != whole)


def test_every_picture_has_noise_of_its_own():
  grey = Photos(np.full((5, 16, 16, 3), 128, np.uint8))
  found = pictures(CorruptedSource(grey, NOISE))
  assert len(np.unique(found, axis=0)) == 5
  noise = found.astype(float) - 128
  np.testing.assert_allclose(noise.std(), 0.12 * 255, rtol=0.05)
  between = np.corrcoef(noise.reshape(5, -1))[~np.eye(5, dtype=bool)]
  assert np.abs(between).max() < 0.2


def test_severities_share_their_noise():
  grey = Photos(np.full((1, 16, 16, 3), 128, np.uint8))
  noise = [
    CorruptedSource(grey, Corruption('gaussian_noise', s))[0]['image'] - 128.0
    for s in (1, 2)
  ]
  np.testing.assert_allclose(noise[1], 2 * noise[0], atol=1.6)


def test_the_fingerprint_tells_damage_apart(photos):
  prints = [photos.fingerprint()] + [
    CorruptedSource(source, corruption, seed=seed).fingerprint()
    for source, corruption, seed in (
      (photos, NOISE, 0),
      (photos, Corruption('gaussian_noise', 4), 0),
      (photos, Corruption('occlusion', 3), 0),
      (photos, NOISE, 1),
      (Photos(photos.pictures, 'others'), NOISE, 0),
    )
  ]
  assert len(set(prints)) == 6
  again = CorruptedSource(photos, Corruption('gaussian_noise', 3))
  assert again.fingerprint() == prints[1]


def test_a_fingerprint_needs_one_below(photos):
  class Plain(Photos):
    fingerprint = None

  with pytest.raises(TypeError, match='Plain has no fingerprint'):
    CorruptedSource(Plain(photos.pictures), NOISE).fingerprint()


def test_queries_and_gallery_are_damaged_alike(photos):
  both = Evaluation(photos, Photos(photos.pictures[::-1]))
  damaged = corrupt_evaluation(both, NOISE)
  for part, sound in zip(damaged, both, strict=True):
    expected = pictures(CorruptedSource(sound, NOISE))
    np.testing.assert_array_equal(pictures(part), expected)
  alone = corrupt_evaluation(Evaluation(photos, None), NOISE, seed=1)
  assert alone.gallery is None
  expected = pictures(CorruptedSource(photos, NOISE, seed=1))
  np.testing.assert_array_equal(pictures(alone.queries), expected)
  assert corrupt_evaluation(both, None) is both


@pytest.mark.parametrize(
  'features',
  [
    np.zeros((2, 4, 4, 3), np.float32),
    np.zeros((2, 8), np.uint8),
    [(np.zeros((2, 2, 5)), np.zeros((1, 1, 5)))],
  ],
)
def test_only_pictures_are_damaged(features):
  source = CorruptedSource(Photos(features), NOISE)
  with pytest.raises(InputError, match='photos/0 is no picture of uint8'):
    source[0]


@pytest.mark.parametrize(
  ('name', 'severity', 'said'),
  [
    ('fog', 1, f'--corruption fog is none of {", ".join(CORRUPTIONS)}'),
    ('contrast', 0, '--severity 0 is none of 1, 2, 3, 4, 5'),
    ('contrast', None, '--corruption contrast needs a --severity'),
    (None, 2, '--severity 2 needs a --corruption: choose one of gaussian'),
  ],
)
def test_what_cannot_be_chosen_is_said(name, severity, said):
  with pytest.raises(InputError) as raised:
    choose_corruption(name, severity)
  assert said in str(raised.value)


def test_two_flags_choose():
  assert choose_corruption(None, None) is None
  assert choose_corruption('pixelate', 5) == Corruption('pixelate', 5)
