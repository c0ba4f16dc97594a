"""Ranks candidates of which only a few are trained.

Every candidate is scored (A and C), the AC policy says which are trained, and
the polynomial that is fitted to these ranks the others. What is scored and what
is trained stays on the disk: the same call goes on where it was stopped.

Attributes:
  rank_backbones: scores, trains, ranks.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from msba_jax.analysis.ac_policy import next_setting
from msba_jax.analysis.ranking import Candidate, Ranking, Request
from msba_jax.analysis.representation import (
  RepresentationScores,
  Sample,
  compile_tokens,
  draw_sample,
  representation_scores,
)
from msba_jax.data.atomic import write_json
from msba_jax.data.directory import MANIFEST
from msba_jax.data.errors import InputError
from msba_jax.metrics import ACFit, fit_ac
from msba_jax.training.compare import Comparison, compare
from msba_jax.training.configuration import configuration_hash
from msba_jax.training.experiment import Experiment
from msba_jax.training.load import load_experiment, load_experiments
from msba_jax.training.loop import train

__all__ = ['rank_backbones']


def rank_backbones(
  request: Request,
  *,
  progress: bool = True,
  say: Callable[[str], None] = lambda line: None,
) -> Ranking:
  """Scores all candidates, trains a few and ranks the others.

  Args:
    request: what to rank.
    progress: whether bars are shown.
    say: is given a line about each candidate.

  Returns:
    The ranking; what was scored and trained is kept in `request.output`.

  Raises:
    InputError: an experiment cannot be loaded, two have one name, or the data
      cannot be ranked on.
    NonFiniteLossError: a training failed.
  """
  experiments = load_experiments(
    request.candidates, request.overrides, seed=request.seed
  )
  scores = _scores(request, experiments, progress=progress, say=say)
  alignment = np.array([score.alignment for score in scores])
  correspondence = np.array([score.correspondence for score in scores])
  measured = np.full(len(scores), np.nan)
  trained: list[int] = []
  for turn in range(request.trainings):
    # A function of the turn: what stands is found again in the same order.
    rng = np.random.default_rng((request.seed, turn))
    chosen = next_setting(alignment, correspondence, trained, rng=rng)
    name = request.candidates[chosen]
    say(f'training {turn + 1} of {request.trainings}: {name}')
    trained.append(chosen)
    measured[chosen] = _train(request, chosen, progress=progress, say=say)
  ridge = request.ridge
  fits = {
    'A and C': fit_ac(alignment, correspondence, measured, ridge=ridge),
    'A alone': fit_ac(alignment, None, measured, ridge=ridge),
    'C alone': fit_ac(None, correspondence, measured, ridge=ridge),
  }
  fit = fits['A and C']
  low, high = fit.interval(
    alignment, correspondence, confidence=request.confidence
  )
  predicted = fit.predict(alignment, correspondence)
  in_top = _in_top(fit, alignment, correspondence)
  rows = [
    Candidate(
      name=experiment.name,
      source=request.candidates[i],
      alignment=scores[i].alignment,
      correspondence=scores[i].correspondence,
      references=scores[i].references,
      predicted=float(predicted[i]),
      low=float(low[i]),
      high=float(high[i]),
      in_top=float(in_top[i]),
      measured=float(measured[i]) if i in trained else None,
      training=trained.index(i) + 1 if i in trained else None,
    )
    for i, experiment in enumerate(experiments)
  ]
  rows.sort(key=lambda row: -row.expected)
  return Ranking(
    candidates=tuple(rows),
    metric=request.metric,
    r_squared={name: fit.r_squared for name, fit in fits.items()},
    leave_one_out_r_squared={
      name: fit.leave_one_out_r_squared for name, fit in fits.items()
    },
    by_alignment=tuple(experiments[i].name for i in np.argsort(-alignment)),
    confidence=request.confidence,
  )


def _scores(
  request: Request,
  experiments: list[Experiment],
  *,
  progress: bool,
  say: Callable[[str], None],
) -> list[RepresentationScores]:
  """Scores of all candidates, those that stand and those that are missing."""
  others = [
    load_experiment(file, request.overrides) for file in request.references
  ]
  drawn: dict[str, tuple[Sample, dict[str, Any]]] = {}
  found = []
  for place, experiment in enumerate(experiments):
    key = _key(request, experiment, others)
    path = request.output / 'scores' / f'{experiment.name}-{key}.json'
    count = f'scores {place + 1} of {len(experiments)}: {experiment.name}'
    if path.exists():
      say(f'{count}: stand in {path}')
      found.append(_read(path))
      continue
    say(count)
    # Candidates may prepare their images differently.
    data = repr(experiment.data)
    if data not in drawn:
      drawn[data] = _drawn(request, experiment, others)
    sample, references = drawn[data]
    warm = _warm_up(request, place, experiment, progress=progress)
    scores = representation_scores(
      compile_tokens(warm), sample, references=references
    )
    write_json(path, scores._asdict())
    found.append(scores)
  return found


def _key(
  request: Request, experiment: Experiment, others: list[Experiment]
) -> str:
  """Of all that scores depend on, the weights on the disk too."""
  facts: list[int | str] = [request.images, request.pairs]
  facts += [request.seed, request.warm_up]
  for one in (experiment, *others):
    facts.append(configuration_hash(one))
    for directory in filter(None, (one.frozen_backbone, one.pretrained)):
      for path in (Path(directory), Path(directory) / 'weights'):
        manifest = path / MANIFEST
        facts.append(manifest.read_text('utf-8') if manifest.exists() else '')
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _drawn(
  request: Request, experiment: Experiment, others: list[Experiment]
) -> tuple[Sample, dict[str, Any]]:
  """The sample of a candidate's data, and its tokens by each reference."""
  for other in others:
    if repr(other.data) != repr(experiment.data):
      raise InputError(
        f'the reference {other.name} has other images than '
        f'{experiment.name}: references and candidates need one size'
      )
  sample = draw_sample(
    experiment.data.open().train,
    images=request.images,
    pairs=request.pairs,
    seed=request.seed,
  )
  return sample, {
    other.name: compile_tokens(other)(sample.images) for other in others
  }


def _warm_up(
  request: Request, place: int, experiment: Experiment, *, progress: bool
) -> Experiment:
  """The experiment with the backbone that a few steps have left."""
  steps = request.warm_up
  if not steps or experiment.frozen_backbone:
    return experiment
  # The loop's own overrides come last, so that they count.
  short = load_experiment(
    request.candidates[place],
    [
      *request.overrides,
      *('--seed', str(request.seed), '--steps', str(steps)),
      *('--optimizer.warmup-steps', str(steps // 10), '--evaluate-every', '0'),
    ],
  )
  directory = request.output / 'warm-up' / configuration_hash(short)[:16]
  train(short, directory, progress=progress)
  return dataclasses.replace(
    experiment, frozen_backbone=str(directory), pretrained=''
  )


def _read(path: Path) -> RepresentationScores:
  try:
    return RepresentationScores(**json.loads(path.read_text('utf-8')))
  except (OSError, ValueError, TypeError) as error:
    raise InputError(
      f'the scores {path} cannot be read ({error}): delete them and run again'
    ) from error


def _train(
  request: Request,
  chosen: int,
  *,
  progress: bool,
  say: Callable[[str], None],
) -> float:
  """Trains a candidate, unless it stands, and gives what it reached."""
  comparison = Comparison(
    experiments=(request.candidates[chosen],),
    seeds=(request.seed,),
    overrides=request.overrides,
    results=request.output / 'results',
    runs=request.output / 'runs',
  )
  outcome = compare(comparison, progress=progress, say=say)[0][0]
  with contextlib.suppress(KeyError):
    return float(np.nanmean(outcome.scores['solo'][request.metric]))
  raise InputError(
    f'{outcome.experiment} has no {request.metric}: one of '
    f'{", ".join(outcome.scores["solo"])}'
  )


def _in_top(
  fit: ACFit, alignment: np.ndarray, correspondence: np.ndarray
) -> np.ndarray:
  """In what share of the fits without one training a candidate is first."""
  fits = [dataclasses.replace(fit, coefficients=row) for row in fit.left_out]
  found = [one.predict(alignment, correspondence) for one in fits]
  ranks = [np.argsort(np.argsort(-values)) for values in found]
  return np.mean([rank < 3 for rank in ranks], axis=0)
