"""Runs: an experiment trained into a directory, and what is asked of it later.

A run directory holds

    experiment.py    a copy of the experiment file
    run.json         overrides, configuration hash, commit, versions, machine
    metrics.jsonl    one line per logged step
    tensorboard/     the same for TensorBoard
    checkpoints/     the last ones, and the best on the validation split
    weights/         the final moving average, statistics and the memory
    evaluation.json  scores, by split (and its corruption) and mode

Attributes:
  Run: a finished run.
  load_run: opens a finished run.
  evaluate_run: scores it.
  run_directory: where the runs of an experiment lie by convention.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from msba_jax.data.atomic import write_json
from msba_jax.data.corrupted import Corruption, corrupt_evaluation
from msba_jax.data.directory import MANIFEST
from msba_jax.data.errors import InputError
from msba_jax.data.source import Evaluation
from msba_jax.metrics import RetrievalScores
from msba_jax.models.context import MemoryBank
from msba_jax.retrieval.embed import Embedder
from msba_jax.retrieval.evaluate import (
  Mode,
  average,
  batch_sensitivity,
  embed_modes,
  score_classification,
  score_vectors,
)
from msba_jax.training.configuration import configuration_hash
from msba_jax.training.experiment import Experiment
from msba_jax.training.load import elsewhere, load_experiment, split_source
from msba_jax.training.results import split_key
from msba_jax.training.weights import load_weights

Split: TypeAlias = Literal['validation', 'test', 'seen']


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A finished run.

  Attributes:
    experiment: what was trained.
    directory: where it stands.
    params: the moving average of the parameters, on the host.
    memory: the memory as the training left it, or None.
    statistics: what the model carries beside its parameters.
  """

  experiment: Experiment
  directory: Path
  params: Any
  memory: MemoryBank | None
  statistics: Any

  @functools.cached_property
  def embedder(self) -> Embedder:
    """The model, ready to embed images."""
    return make_embedder(self.experiment, self.params, self.statistics)

  @property
  def fingerprint(self) -> str:
    """SHA-256 over model, parameters and normalisation."""
    return self.embedder.fingerprint


def make_embedder(
  experiment: Experiment, params: Any, statistics: Any
) -> Embedder:
  """The model of an experiment with the given parameters and statistics."""
  return Embedder(
    model=experiment.model,
    params=params,
    mean=experiment.mean,
    std=experiment.std,
    statistics=statistics,
  )


def run_directory(root: str | Path, experiment: Experiment) -> Path:
  """Where a run lies by convention: `<root>/<name>/seed<seed>`."""
  return Path(root) / experiment.name / f'seed{experiment.seed}'


def load_run(
  directory: str | Path, experiment: Experiment | None = None
) -> Run:
  """Opens a finished run.

  Args:
    directory: of the run.
    experiment: what was trained there; by default the directory's own copy of
      the experiment file and its overrides say it.

  Returns:
    The run, with its parameters on the host.

  Raises:
    InputError: there is no run, it is not finished, or it was changed.
  """
  directory = Path(directory)
  record = read_record(directory)
  if not (directory / 'weights' / MANIFEST).exists():
    raise InputError(
      f'the run {directory} is not finished; give its `msba train` command '
      'again to go on with it'
    )
  if experiment is None:
    experiment = _experiment_of(directory, record)
  found = configuration_hash(experiment)
  if found != record['configuration']:
    raise InputError(
      f'the run {directory} was trained with configuration '
      f'{record["configuration"][:12]}, its experiment now has {found[:12]}; '
      'use the code and the experiment file that trained it'
    )
  weights = load_weights(directory / 'weights')
  params, memory = weights.pop('params'), weights.pop('memory', None)
  memory = None if memory is None else MemoryBank(**memory)
  return Run(experiment, directory, params, memory, statistics=weights)


class RunEvaluation(NamedTuple):
  """What a run reached on one split.

  Attributes:
    scores: by mode, by metric: the mean over the queries.
    per_query: by mode, by metric: one number for each query.
    labels: class of each query.
    ids: name of each query.
    batch_sensitivity: see `msba_jax.retrieval.sensitivity`.
  """

  scores: dict[Mode, dict[str, float]]
  per_query: dict[Mode, dict[str, np.ndarray]]
  labels: np.ndarray
  ids: tuple[str, ...]
  batch_sensitivity: float


def available_modes(run: Run) -> tuple[Mode, ...]:
  """The modes that can be told apart for the model of a run."""
  modes: list[Mode] = ['solo']
  if run.experiment.model.contextual:
    modes.append('neighbours')
    if run.memory is not None:
      modes.append('memory')
  return (*modes, 'refinement')


def evaluate_run(
  run: Run,
  *,
  split: Split = 'validation',
  corruption: Corruption | None = None,
  modes: Sequence[Mode] | None = None,
  progress: bool = True,
) -> RunEvaluation:
  """Scores a run and notes `evaluation.json`.

  Args:
    run: from `load_run` or `train`.
    split: choices are made on `validation`; `test` is looked at once. Neither
      has a class of the training; `seen` are other images of its classes,
      where `classifier` is a mode too: each image asks the proxies of the
      classes, and recall@1 is the accuracy of the classification.
    corruption: of queries and gallery, before anything sees them. The run
      stays as it is, its memory too: no training image is damaged.
    modes: how images are asked; all that apply by default.
    progress: whether bars are shown.

  Returns:
    Means and the scores of each query.

  Raises:
    InputError: the data cannot be read, or is no pictures where they are to be
      damaged; no images were held out for `seen`; the run has no memory for
      the mode `memory`.
  """
  modes = available_modes(run) if modes is None else modes
  if 'memory' in modes and run.memory is None:
    raise InputError(
      f'the run {run.directory} has no memory; leave out the mode memory or '
      'train with --memory-size'
    )
  config, splits = run.experiment.evaluation, run.experiment.data.open()
  evaluation: Evaluation | None = getattr(splits, split)
  if evaluation is None:
    raise InputError(
      f'{run.experiment.name} held no images of its training classes out; '
      'train with --data.held-out-images'
    )
  evaluation = corrupt_evaluation(evaluation, corruption)
  vectors = embed_modes(
    run.embedder,
    evaluation,
    modes=modes,
    memory=None if run.memory is None else run.memory.context(),
    batch_size=config.batch_size,
    neighbours=config.neighbours,
    progress=progress,
  )
  per_query: dict[Mode, RetrievalScores] = {
    mode: score_vectors(found, evaluation) for mode, found in vectors.items()
  }
  queries = evaluation.queries
  if split == 'seen' and 'solo' in vectors and 'proxies' in run.params:
    per_query['classifier'] = score_classification(
      vectors['solo'].queries, np.asarray(queries.labels), run.params['proxies']
    )
  result = RunEvaluation(
    scores={mode: average(scores) for mode, scores in per_query.items()},
    per_query=per_query,
    labels=np.asarray(queries.labels),
    ids=tuple(queries.ids),
    batch_sensitivity=batch_sensitivity(
      run.embedder,
      queries,
      batch_size=run.experiment.batch_size,
      progress=progress,
    ),
  )
  key = split_key(split, corruption)
  _note(run.directory / 'evaluation.json', key, result)
  return result


def read_record(directory: Path) -> dict[str, Any]:
  """What `run.json` says.

  Args:
    directory: of the run.

  Returns:
    `name`, `seed`, `source`, `overrides`, `configuration`, `parameters`, …

  Raises:
    InputError: there is no run, or the file is broken.
  """
  path = directory / 'run.json'
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
    _ = record['configuration'], record['source'], record['overrides']
  except FileNotFoundError:
    raise InputError(
      f'{directory} holds no run (no run.json); give the directory that '
      '`msba train` wrote'
    ) from None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f'{path} is unreadable ({error}); train the run again'
    ) from error
  return record


def _experiment_of(directory: Path, record: dict[str, Any]) -> Experiment:
  source = record['source']
  if source is None:
    raise InputError(
      f'the run {directory} was trained from Python, without an experiment '
      'file; pass its experiment to load_run'
    )
  if split_source(source)[0] == 'experiment.py':
    source = elsewhere(source, directory / 'experiment.py')
  return load_experiment(source, record['overrides'])


def _note(path: Path, key: str, result: RunEvaluation) -> None:
  """Adds the scores of a split to `evaluation.json`; others stay."""
  try:
    noted = json.loads(path.read_text(encoding='utf-8'))
  except (FileNotFoundError, ValueError):
    noted = {}
  noted[key] = {
    'queries': len(result.ids),
    'batch_sensitivity': result.batch_sensitivity,
    'scores': result.scores,
  }
  write_json(path, noted)
