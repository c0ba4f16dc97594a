"""Tests of `msba_jax.analysis.representation`."""

import dataclasses
from statistics import mean

import numpy as np
import pytest

from msba_jax.analysis.representation import (
  Sample,
  compile_tokens,
  draw_sample,
  representation_scores,
)
from msba_jax.data.errors import InputError
from msba_jax.training.loop import train
from tests.analysis.candidates import experiment
from tests.training.small_experiment import Drawn


class Textured(Drawn):
  """Blocks of random colours: every place of a picture is unlike the others."""

  def __getitem__(self, index):
    rng = np.random.default_rng([self._seed, index])
    blocks = rng.integers(0, 256, (8, 8, 3), np.uint8)
    image = blocks.repeat(self._size // 8, 0).repeat(self._size // 8, 1)
    return {'image': image, 'label': int(self.labels[index])}


@pytest.fixture
def sample():
  return draw_sample(Drawn(5, 12, 16, 0), images=40, pairs=12, seed=0)


def of_labels(sample, strength, rng):
  """A representation that knows the class, the more the stronger."""
  vectors = rng.normal(size=(6, 10))
  labels = {
    picture.tobytes(): label
    for picture, label in zip(sample.images, sample.labels, strict=True)
  }

  def tokens(images):
    known = [labels.get(picture.tobytes(), 0) for picture in images]
    grid = strength * vectors[known][:, None, None]
    noise = rng.normal(size=(len(images), 4, 4, 10))
    return (grid + noise).astype(np.float32)

  return tokens


def test_a_sample_has_as_many_images_of_each_class_as_can_be(sample):
  assert sorted(np.bincount(sample.labels)) == [8] * 5
  assert len(sample.pairs) == 12
  assert len({picture.tobytes() for picture in sample.images}) == 40
  again = draw_sample(Drawn(5, 12, 16, 0), images=40, pairs=12, seed=0)
  np.testing.assert_array_equal(again.images, sample.images)
  other = draw_sample(Drawn(5, 12, 16, 0), images=40, pairs=12, seed=1)
  assert not np.array_equal(other.images, sample.images)


def test_more_images_than_there_are_take_all():
  found = draw_sample(Drawn(2, 3, 16, 0), images=50, pairs=50, seed=0)
  assert len(found.images) == len(found.pairs) == 6


def test_what_knows_the_class_is_aligned(sample, rng):
  scores = [
    representation_scores(of_labels(sample, strength, rng), sample).alignment
    for strength in (0.0, 0.5, 5.0)
  ]
  assert abs(scores[0]) < 0.1
  assert scores[0] + 0.1 < scores[1] < scores[2] - 0.1
  assert scores[2] > 0.9


def test_a_map_that_is_fitted_to_noise_is_not_aligned(rng):
  sample = draw_sample(Drawn(10, 30, 16, 0), images=300, pairs=1, seed=0)

  # More features than images: every half can be fitted to the bit.
  def tokens(images):
    return rng.normal(size=(len(images), 1, 1, 400)).astype(np.float32)

  assert abs(representation_scores(tokens, sample).alignment) < 0.1


def test_pixels_find_their_places_and_noise_does_not(rng):
  found = draw_sample(Textured(4, 6, 64, 0), images=20, pairs=20, seed=0)

  def pixels(images):
    grid = images.reshape(len(images), 16, 4, 16, 4, 3).mean(axis=(2, 4))
    return (grid - 128).astype(np.float32)

  def noise(images):
    return rng.normal(size=(len(images), 16, 16, 8)).astype(np.float32)

  seen = representation_scores(pixels, found).correspondence
  assert seen > 0.4
  assert representation_scores(noise, found).correspondence < 0.2


def test_references_are_averaged_with_the_classes(sample, rng):
  tokens = of_labels(sample, 5.0, rng)
  grid = tokens(sample.images)
  unrelated = rng.normal(size=grid.shape).astype(np.float32)
  found = representation_scores(
    tokens, sample, references={'same': grid, 'unrelated': unrelated}
  )
  assert set(found.references) == {'classes', 'same', 'unrelated'}
  assert found.alignment == pytest.approx(mean(found.references.values()))
  assert found.references['same'] > 0.8
  assert found.references['unrelated'] < 0.6


def test_tokens_are_levels_side_by_side(sample):
  narrow = compile_tokens(experiment('narrow'))(sample.images)
  last = compile_tokens(experiment('last'))(sample.images)
  assert narrow.shape == (40, 8, 8, 10)
  assert last.shape == (40, 4, 4, 6)
  # Every level has size one in the mean.
  for level in (last, narrow[..., :4]):
    np.testing.assert_allclose(np.mean(level**2, axis=(1, 2, 3)), 1, rtol=1e-4)


def test_an_image_has_its_tokens_in_any_batch(sample):
  tokens = compile_tokens(experiment('wide'))
  np.testing.assert_allclose(
    tokens(sample.images)[33:36], tokens(sample.images[33:36]), atol=1e-5
  )


def test_a_frozen_backbone_is_that_of_its_run(sample, tmp_path):
  base = experiment('narrow')
  before = compile_tokens(base)(sample.images)
  train(base, tmp_path / 'run', progress=False)
  frozen = dataclasses.replace(base, frozen_backbone=str(tmp_path / 'run'))
  after = compile_tokens(frozen)(sample.images)
  assert np.abs(after - before).max() > 1e-3


def test_data_that_cannot_be_ranked_on(rng):
  with pytest.raises(InputError, match='no two classes with two images'):
    draw_sample(Drawn(8, 4, 16, 0), images=6, pairs=1, seed=0)

  class Features(Drawn):
    def __getitem__(self, index):
      return {'image': np.zeros((2, 2, 3), 'f4'), 'label': 0}

  with pytest.raises(InputError, match='hold features'):
    draw_sample(Features(2, 4, 16, 0), images=6, pairs=1, seed=0)


def test_pairs_without_a_visible_point_do_not_count(sample, rng):
  hidden = [
    pair._replace(visible=np.zeros_like(pair.visible)) for pair in sample.pairs
  ]
  some = Sample(sample.images, sample.labels, (*sample.pairs[:6], *hidden[6:]))
  tokens = compile_tokens(experiment('narrow'))
  fewer = sample._replace(pairs=sample.pairs[:6])
  assert representation_scores(tokens, some).correspondence == pytest.approx(
    representation_scores(tokens, fewer).correspondence, abs=1e-6
  )
