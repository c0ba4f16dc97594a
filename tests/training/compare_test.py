"""Tests of `msba_jax.training.compare` on runs that stand."""

import dataclasses
import shutil

import numpy as np
import pytest

from msba_jax.data.corrupted import Corruption, corrupt_evaluation
from msba_jax.retrieval.evaluate import evaluate_modes
from msba_jax.training.compare import Comparison, compare
from msba_jax.training.configuration import configuration_hash
from msba_jax.training.results import scores_sha256
from msba_jax.training.run import evaluate_run
from tests.training.conftest import SMALL

NOISE = Corruption('gaussian_noise', 5)


@pytest.fixture
def standing(small_run, tmp_path):
  """A comparison whose only training stands already."""
  digest = configuration_hash(small_run.experiment)
  shutil.copytree(
    small_run.directory, tmp_path / 'runs' / f'small-{digest[:12]}' / 'seed0'
  )
  return Comparison(
    experiments=(str(SMALL),),
    seeds=(0,),
    split='test',
    results=tmp_path / 'results',
    runs=tmp_path / 'runs',
  )


def test_damaged_scores_lie_beside_sound_ones(standing, small_run, monkeypatch):
  digest = configuration_hash(small_run.experiment)
  sound = compare(standing, progress=False)[0][0]
  folder = standing.results / 'small'
  path = folder / f'test-seed0-{digest[:12]}.json'
  before = path.read_bytes()
  damaged_one = dataclasses.replace(standing, corruption=NOISE)
  damaged = compare(damaged_one, progress=False)[0][0]
  beside = folder / f'test-gaussian_noise-5-seed0-{digest[:12]}.json'
  assert set(folder.iterdir()) == {path, beside}
  assert path.read_bytes() == before
  assert (sound.split, damaged.split) == ('test', 'test-gaussian_noise-5')
  np.testing.assert_array_equal(sound.labels, damaged.labels)
  assert sound.configuration == damaged.configuration
  assert scores_sha256(sound) != scores_sha256(damaged)
  # The run is the one that stood, and each score is found again as it was.
  monkeypatch.setattr('msba_jax.training.compare._run', None)
  for comparison, outcome in ((standing, sound), (damaged_one, damaged)):
    again = compare(comparison, progress=False)[0][0]
    assert scores_sha256(again) == scores_sha256(outcome)


@pytest.mark.parametrize('gallery', [False, True])
def test_scores_are_those_of_damaged_images(small_run, tmp_path, gallery):
  data = dataclasses.replace(small_run.experiment.data, gallery=gallery)
  run = dataclasses.replace(
    small_run,
    directory=tmp_path,
    experiment=dataclasses.replace(small_run.experiment, data=data),
  )
  found = evaluate_run(
    run, split='test', corruption=NOISE, modes=('solo',), progress=False
  )
  expected = evaluate_modes(
    run.embedder,
    corrupt_evaluation(data.open().test, NOISE),
    modes=('solo',),
    batch_size=48,
    progress=False,
  )
  for metric, values in expected['solo'].items():
    np.testing.assert_allclose(
      found.per_query['solo'][metric], values, atol=1e-6
    )
  sound = evaluate_run(run, split='test', modes=('solo',), progress=False)
  assert found.scores['solo'] != sound.scores['solo']
  assert found.batch_sensitivity != sound.batch_sensitivity
