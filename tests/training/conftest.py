"""The small experiment, loaded from its file as a user's would be."""

import dataclasses
from pathlib import Path

import jax
import pytest

from msba_jax.training.load import load_experiment
from msba_jax.training.loop import train

SMALL = Path(__file__).with_name('small_experiment.py')


@pytest.fixture(scope='session')
def small():
  """`small(steps=3)`: the small experiment with fields changed."""
  return lambda **changes: dataclasses.replace(
    load_experiment(SMALL), **changes
  )


@pytest.fixture(scope='session')
def small_run(tmp_path_factory):
  """A finished run of the small experiment, trained without interruption."""
  directory = tmp_path_factory.mktemp('runs') / 'small'
  experiment = load_experiment(SMALL, ['--evaluate-every', '3'])
  return train(experiment, directory, devices=jax.devices()[:2], progress=False)
