"""What a ranking of candidates is asked for with, and what it is.

Attributes:
  Request: what to rank, and how.
  Candidate: one row of the ranking.
  Ranking: the whole of it.
"""

import dataclasses
from pathlib import Path

from msba_jax.data.errors import InputError
from msba_jax.training.experiment import Metric

__all__ = ['Candidate', 'Ranking', 'Request']


@dataclasses.dataclass(frozen=True)
class Request:
  """What to rank, and how.

  Attributes:
    candidates: experiment files; each with the name of its own.
    overrides: applied to every experiment.
    references: experiment files whose backbones are a reference of the
      alignment beside the classes.
    trainings: how many candidates are trained.
    images: how many are looked at for the alignment.
    pairs: how many are warped for the correspondence.
    warm_up: steps that each candidate is trained before it is scored, for
      backbones that begin at random; frozen ones stay as they are.
    seed: of the sample, the policy and the trainings.
    metric: of retrieval on validation, mode `solo`.
    confidence: of the intervals.
    ridge: of the polynomial, as in `fit_ac`.
    output: directory of all that is kept.
  """

  candidates: tuple[str, ...]
  overrides: tuple[str, ...] = ()
  references: tuple[str, ...] = ()
  trainings: int = 4
  images: int = 600
  pairs: int = 200
  warm_up: int = 0
  seed: int = 0
  metric: Metric = 'ap'
  confidence: float = 0.8
  ridge: float = 0.0
  output: Path = Path('ranking')

  def __post_init__(self):
    number = len(self.candidates)
    if number < 2:
      raise InputError('--candidates must name two experiments or more')
    if not 1 <= self.trainings <= number:
      raise InputError(
        f'--trainings {self.trainings} must be between 1 and the number of '
        f'candidates, {number}'
      )
    for name in ('images', 'pairs'):
      if getattr(self, name) < 1:
        raise InputError(f'--{name} {getattr(self, name)} must be at least 1')
    if self.pairs > self.images:
      raise InputError(
        f'--pairs {self.pairs} must be at most --images {self.images}'
      )
    if self.warm_up < 0:
      raise InputError(f'--warm-up {self.warm_up} must not be negative')
    if not 0 < self.confidence < 1:
      raise InputError(f'--confidence {self.confidence} must be in (0, 1)')
    if self.ridge < 0:
      raise InputError(f'--ridge {self.ridge} must not be negative')


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One row of the ranking.

  Attributes:
    name: of the experiment.
    source: its file.
    alignment: A.
    correspondence: C.
    references: alignment with each reference.
    predicted: what the polynomial says, in the unit of the metric.
    low: lower end of the interval of the prediction.
    high: upper end.
    in_top: in what share of the fits without one training it is among the
      first three.
    measured: what it reached, or None if it was not trained.
    training: its place among the trainings, from 1, or None.
  """

  name: str
  source: str
  alignment: float
  correspondence: float
  references: dict[str, float]
  predicted: float
  low: float
  high: float
  in_top: float
  measured: float | None
  training: int | None

  @property
  def expected(self) -> float:
    """What it reached, or what is predicted."""
    return self.predicted if self.measured is None else self.measured


@dataclasses.dataclass(frozen=True)
class Ranking:
  """Candidates from the best to the worst, and what the fit is worth.

  Attributes:
    candidates: in the order of what they reached or are predicted to reach.
    metric: of their performance.
    r_squared: by what was fitted ('A and C', 'A alone', 'C alone'): in sample.
    leave_one_out_r_squared: likewise; NaN for fewer than three trainings.
    by_alignment: names in the order of A alone.
    confidence: of the intervals.
  """

  candidates: tuple[Candidate, ...]
  metric: Metric
  r_squared: dict[str, float]
  leave_one_out_r_squared: dict[str, float]
  by_alignment: tuple[str, ...]
  confidence: float
