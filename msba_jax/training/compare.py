"""Several experiments over several seeds: trained, scored, kept, compared.

Each finished run leaves one JSON file, see `msba_jax.training.results`. What
stands is not run again, so a long comparison grows over several sittings, and
one that was interrupted goes on with the same call.

Attributes:
  Comparison: what to compare, and where it is kept.
  compare: runs what is missing and reads the rest.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from msba_jax.data.corrupted import Corruption
from msba_jax.data.errors import InputError
from msba_jax.training.configuration import configuration_hash
from msba_jax.training.experiment import Experiment
from msba_jax.training.frozen import refuse_other_backbone, standing_digest
from msba_jax.training.load import load_experiments
from msba_jax.training.loop import train
from msba_jax.training.results import (
  Outcome,
  outcome_path,
  read_outcome,
  split_key,
  write_outcome,
)
from msba_jax.training.run import Run, Split, evaluate_run, read_record

__all__ = ['Comparison', 'compare']


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What to compare, and where it is kept.

  Attributes:
    experiments: files or modules; the first is what others are compared with.
    seeds: of the trainings; every experiment has all of them.
    overrides: applied to every experiment.
    split: on which images to score, see `evaluate_run`.
    corruption: what is done to them first; a run that stands is scored again
      and not trained again.
    results: directory of the result files.
    runs: directory of the run directories.
  """

  experiments: tuple[str, ...]
  seeds: tuple[int, ...] = (0, 1, 2)
  overrides: tuple[str, ...] = ()
  split: Split = 'validation'
  corruption: Corruption | None = None
  results: Path = Path('results')
  runs: Path = Path('runs')


def compare(
  comparison: Comparison,
  *,
  progress: bool = True,
  say: Callable[[str], None] = lambda line: None,
) -> list[list[Outcome]]:
  """Runs what is missing and reads the rest.

  Seeds are the outer loop, so that an unfinished comparison has every
  experiment over the same seeds.

  Args:
    comparison: what to compare.
    progress: whether bars are shown.
    say: is given a line about every run before it begins.

  Returns:
    For each experiment, its outcomes in the order of the seeds.

  Raises:
    InputError: an experiment cannot be loaded, two have one name, a result
      cannot be read, or it or a run was made with a frozen backbone that has
      been trained anew since.
    NonFiniteLossError: a training failed.
  """
  _check(comparison)
  found: dict[tuple[int, int], Outcome] = {}
  total = len(comparison.experiments) * len(comparison.seeds)
  for seed in comparison.seeds:
    for place, experiment in enumerate(
      load_experiments(comparison.experiments, comparison.overrides, seed=seed)
    ):
      path = outcome_path(
        comparison.results,
        experiment=experiment.name,
        configuration=configuration_hash(experiment),
        seed=seed,
        split=split_key(comparison.split, comparison.corruption),
      )
      count = f'[{len(found) + 1}/{total}]'
      if path.exists():
        say(f'{count} {experiment.name} seed {seed}: stands in {path}')
        outcome = read_outcome(path)
        now = standing_digest(experiment)
        # A result that is older than this entry does not say.
        made_with = outcome.record.get('frozen_backbone', now)
        refuse_other_backbone(experiment, made_with, now, path)
      else:
        say(f'{count} {experiment.name} seed {seed}: training and scoring')
        outcome = _run(comparison, experiment, progress=progress)
        write_outcome(path, outcome)
      found[place, seed] = outcome
  return [
    [found[place, seed] for seed in comparison.seeds]
    for place in range(len(comparison.experiments))
  ]


def _check(comparison: Comparison) -> None:
  if not comparison.experiments:
    raise InputError('there is nothing to compare: name an experiment file')
  if not comparison.seeds or len(set(comparison.seeds)) != len(
    comparison.seeds
  ):
    raise InputError(
      f'--seeds {" ".join(map(str, comparison.seeds))} must be one or more '
      'different numbers'
    )


def _run(
  comparison: Comparison, experiment: Experiment, *, progress: bool
) -> Outcome:
  """Trains and scores one experiment with one seed."""
  configuration = configuration_hash(experiment)
  directory = (
    comparison.runs / f'{experiment.name}-{configuration[:12]}'
  ) / f'seed{experiment.seed}'
  started = time.monotonic()
  run = train(experiment, directory, progress=progress)
  trained = time.monotonic()
  evaluation = evaluate_run(
    run,
    split=comparison.split,
    corruption=comparison.corruption,
    progress=progress,
  )
  record = _record(run, comparison.overrides)
  return Outcome(
    experiment=experiment.name,
    configuration=configuration,
    seed=experiment.seed,
    split=split_key(comparison.split, comparison.corruption),
    parameters=read_record(directory)['parameters'],
    labels=evaluation.labels,
    scores={
      str(mode): dict(metrics) for mode, metrics in evaluation.per_query.items()
    },
    record={
      **record,
      'batch_sensitivity': evaluation.batch_sensitivity,
      'training_seconds': trained - started,
      'scoring_seconds': time.monotonic() - trained,
    },
  )


def _record(run: Run, overrides: Sequence[str]) -> dict[str, object]:
  """Commit, machine, versions and frozen backbone of the training."""
  noted = read_record(run.directory)
  surroundings = dict(noted['environment'])
  return {
    'commit': surroundings.pop('commit', None),
    'overrides': list(overrides),
    'frozen_backbone': noted.get('frozen_backbone'),
    'train_images': noted['train_images'],
    'train_classes': noted['train_classes'],
    'environment': surroundings,
  }
