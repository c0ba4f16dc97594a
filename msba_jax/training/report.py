"""The report of a run: its scores, results, attention, curves and settings.

Attributes:
  report_run: writes the page.
  settings: an experiment as nested plain values, for a reader.
"""

import dataclasses
import functools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from msba_jax.retrieval.evaluate import (
  ModeVectors,
  embed_modes,
  score_vectors,
)
from msba_jax.retrieval.report.collect import RunInfo, collect_report
from msba_jax.retrieval.report.page import write_report
from msba_jax.retrieval.search import Neighbours, search
from msba_jax.training.experiment import Experiment
from msba_jax.training.load import elsewhere, split_source
from msba_jax.training.record import read_metrics
from msba_jax.training.run import Run, available_modes, read_record

__all__ = ['report_run', 'settings']

_RESULTS = 20  # of each query; the page shows fewer


def report_run(
  run: Run,
  path: str | Path,
  *,
  split: Literal['validation', 'test'] = 'validation',
  progress: bool = True,
) -> None:
  """Scores a run on a split and writes one self-contained HTML page about it.

  Args:
    run: from `load_run` or `train`.
    path: of the page; it is replaced as a whole.
    split: which classes.
    progress: whether bars are shown.

  Raises:
    InputError: the data cannot be read.
  """
  splits, config = run.experiment.data.open(), run.experiment.evaluation
  evaluation = splits.validation if split == 'validation' else splits.test
  modes = available_modes(run)
  vectors = embed_modes(
    run.embedder,
    evaluation,
    modes=modes,
    memory=None if run.memory is None else run.memory.context(),
    batch_size=config.batch_size,
    neighbours=config.neighbours,
    progress=progress,
  )
  after = 'neighbours' if 'neighbours' in modes else 'refinement'
  record = read_record(run.directory)
  data = collect_report(
    run.embedder,
    evaluation,
    RunInfo(
      title=f'{run.experiment.name} on {split} classes',
      description=(
        f'Seed {run.experiment.seed}, trained for {run.experiment.steps:,} '
        f'steps of {run.experiment.batch_size} images on '
        f'{record["train_images"]:,} images of {record["train_classes"]:,} '
        f'classes, none of which is among those asked here'
      ),
      command=_command(run, record),
      rows=read_metrics(run.directory),
      configuration=settings(run.experiment),
      environment=record['environment'],
    ),
    scores={mode: score_vectors(vectors[mode], evaluation) for mode in modes},
    results={mode: _results(vectors[mode]) for mode in ('solo', after)},
    vectors=vectors,
    neighbours=config.neighbours,
  )
  write_report(path, data)


def settings(experiment: Experiment) -> dict[str, Any]:
  """An experiment as nested plain values, for a reader.

  Args:
    experiment: what is described.

  Returns:
    A mapping of mappings and plain values.
  """
  return {
    field.name: _plain(getattr(experiment, field.name))
    for field in dataclasses.fields(experiment)
    if field.name not in ('origin', 'name')
  } | {
    'losses': ', '.join(f'{t.weight:g} × {t.name}' for t in experiment.losses),
  }


def _plain(value: Any) -> Any:
  """A value as a reader would name it."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {
      field.name: _plain(getattr(value, field.name))
      for field in dataclasses.fields(value)
      if field.name not in ('parent', 'name')
    }
    return {'kind': type(value).__name__, **fields}
  if isinstance(value, Mapping):
    return {str(name): _plain(part) for name, part in value.items()}
  if isinstance(value, tuple | list):
    return ', '.join(str(_plain(part)) for part in value)
  if isinstance(value, functools.partial):
    words = [f'{name}={_plain(v)}' for name, v in value.keywords.items()]
    return f'{_plain(value.func)}({", ".join(words)})'
  return getattr(value, '__name__', value)


def _results(vectors: ModeVectors) -> Neighbours:
  """The best results of every query; among themselves none answers itself."""
  own = vectors.gallery is None
  gallery = vectors.queries if vectors.gallery is None else vectors.gallery
  return search(vectors.queries, gallery, _RESULTS, exclude_self=own)


def _command(run: Run, record: Mapping[str, Any]) -> str:
  """What trains the run again."""
  origin = run.experiment.origin
  if origin is None:
    return ''
  source = origin.source
  if split_source(record['source'])[0] == 'experiment.py':
    source = elsewhere(source, run.directory / 'experiment.py')
  return shlex.join(['msba', 'train', source, *record['overrides']])
