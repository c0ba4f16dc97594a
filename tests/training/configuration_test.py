import dataclasses
import functools
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from msba_jax.losses.term import LossTerm
from msba_jax.training.configuration import configuration_hash, describe
from msba_jax.training.experiment import Experiment, OptimizerConfig
from msba_jax.training.load import load_experiment

FILE = """
import functools

import flax.linen as nn
import jax.numpy as jnp

from msba_jax.losses.term import LossTerm
from msba_jax.training.experiment import Experiment


def scaled(factor):
  return lambda out, batch: factor * out['solo'].mean()


def shifted(out, batch, shift):
  return out['solo'].mean() + shift


def experiment():
  return Experiment(
    name='hashed',
    model=nn.Dense(3, kernel_init=nn.initializers.normal(0.1)),
    losses=(
      LossTerm('a', 1.0, scaled(2.0)),
      LossTerm('b', 1.0, functools.partial(shifted, shift=jnp.float32(1))),
    ),
    data=None,
  )
"""
PRINT = """
import sys
from msba_jax.training.configuration import configuration_hash
from msba_jax.training.load import load_experiment
print(configuration_hash(load_experiment(sys.argv[1])))
"""


def _zero(out, batch):
  return 0.0 * out['solo'].mean()


@pytest.fixture
def experiment():
  return Experiment(
    name='x',
    model=nn.Dense(3),
    losses=(LossTerm('zero', 1.0, _zero),),
    data=None,
  )


def test_another_process_and_a_copied_file_have_the_same_hash(tmp_path):
  path = tmp_path / 'hashed.py'
  path.write_text(FILE)
  copy = tmp_path / 'run' / 'experiment.py'
  copy.parent.mkdir()
  copy.write_text(FILE)
  done = subprocess.run(
    [sys.executable, '-c', PRINT, str(copy)],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == configuration_hash(load_experiment(path))


@pytest.mark.parametrize(
  'change',
  [
    {'seed': 1},
    {'steps': 700},
    {'model': nn.Dense(4)},
    {'model': nn.Dense(3, use_bias=False)},
    {'losses': (LossTerm('zero', 0.5, _zero),)},
    {'losses': (LossTerm('zero', 1.0, lambda out, batch: 1.0),)},
    {'optimizer': OptimizerConfig(learning_rate=0.5)},
    {'augment': jax.random.fold_in},
    {'mean': (0.1, 0.2, 0.3)},
  ],
)
def test_what_decides_the_numbers_changes_the_hash(experiment, change):
  changed = dataclasses.replace(experiment, **change)
  assert configuration_hash(changed) != configuration_hash(experiment)


@pytest.mark.parametrize(
  'field', ['log_every', 'checkpoint_every', 'evaluate_every']
)
def test_how_a_run_is_watched_does_not(experiment, field):
  changed = dataclasses.replace(experiment, **{field: 13})
  assert configuration_hash(changed) == configuration_hash(experiment)


def test_closures_and_partials_are_told_apart():
  def scaled(factor):
    return lambda x: factor * x

  def add(x, y):
    return x + y

  assert describe(scaled(1.0)) == describe(scaled(1.0))
  assert describe(scaled(1.0)) != describe(scaled(2.0))
  assert describe(functools.partial(add, y=1)) != describe(
    functools.partial(add, y=2)
  )
  assert describe(np.zeros(2)) != describe(np.zeros(3))
  assert describe(np.arange(2)) != describe(np.arange(2)[::-1])


def test_functions_of_jax_have_a_description():
  for function in (jax.nn.gelu, jax.jit(_zero), np.tanh, len, jax.nn.relu):
    assert '0x' not in str(describe(function))


def test_what_has_no_description_is_refused():
  with pytest.raises(TypeError, match='cannot be part of an experiment'):
    describe(object())
