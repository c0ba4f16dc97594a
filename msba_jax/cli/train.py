"""Trains an experiment into a run directory, or resumes where it stopped.

What follows the experiment file overrides fields of the experiment; `--fields`
lists them. A run that is complete is left as it is.

Attributes:
  Options: the flags of `msba train` itself.
  run: trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

EXAMPLES = """\
  msba train experiments/scenes_msba.py
  msba train experiments/scenes_msba.py --fields
  msba train experiments/scenes_msba.py --steps 500 --seed 1
  msba train experiments/tiny_imagenet_msba.py --data.path tiny_imagenet.zip
  msba train mine.py --runs-dir trials --optimizer.learning-rate 3e-4
"""
INTERRUPTED = (
  'What was written into the run directory stays; the same command resumes '
  'from the last checkpoint.'
)
TAKES_OVERRIDES = True


@dataclass(frozen=True)
class Options:
  """Flags of `msba train`."""

  experiment: Annotated[str, Positional, arg(metavar='EXPERIMENT')]
  """Python file that defines experiment(), or the name of such a module."""
  runs_dir: Path = Path('runs')
  """The run goes into <runs-dir>/<name of the experiment>/seed<seed>."""
  fields: bool = False
  """List the fields that can be overridden, with their values, and stop."""


def run(options: Options, overrides: Sequence[str]) -> int:
  """Trains; 0 when the last step is done."""
  from msba_jax.training.distributed import initialize
  from msba_jax.training.load import load_experiment

  if options.fields:
    load_experiment(options.experiment, ['--help'])
  initialize()
  from msba_jax.training.loop import train
  from msba_jax.training.run import run_directory

  experiment = load_experiment(options.experiment, overrides)
  directory = run_directory(options.runs_dir, experiment)
  train(experiment, directory)
  print(f'The run stands in {directory}.')
  print(f'Next: msba evaluate {directory} --split validation')
  return 0
