"""The table of a comparison: means, intervals, differences, parameters.

Rows are experiments by modes. An interval is a bootstrap over seeds, classes
and queries at once, so it says what another training and other classes of the
same kind would give. A difference is paired: both rows are resampled with the
same seeds, classes and queries.

Attributes:
  Row: one line of the table.
  comparison_rows: from outcomes to rows.
  markdown_table: from rows to text.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from msba_jax.data.errors import InputError
from msba_jax.metrics.intervals import (
  Interval,
  bootstrap_interval,
  paired_bootstrap,
)
from msba_jax.training.results import Outcome

__all__ = ['Row', 'comparison_rows', 'markdown_table']

# "Equal parameters" means within this share of those of the first experiment.
EQUAL_PARAMETERS = 0.02


# The mode that is no retrieval, and is not compared with one.
CLASSIFIER = 'classifier'

_Scored = tuple[Sequence[Outcome], str]  # the runs of an experiment, and a mode


class Row(NamedTuple):
  """One experiment in one mode.

  Attributes:
    experiment: its name.
    mode: how its images were embedded.
    parameters: of the model.
    seeds: of the trainings it is a mean over.
    values: the mean with its interval, by metric.
    gains: paired difference to the first row, or to the first experiment's
      classifier if it is one; None for these rows themselves.
    mode_gains: paired difference to the same models in `solo`, by metric;
      None where the mode is `solo`, or it is missing.
  """

  experiment: str
  mode: str
  parameters: int
  seeds: tuple[int, ...]
  values: Mapping[str, Interval]
  gains: Mapping[str, Interval] | None
  mode_gains: Mapping[str, Interval] | None


def comparison_rows(
  outcomes: Sequence[Sequence[Outcome]],
  *,
  metrics: Sequence[str],
  resamples: int = 2000,
  seed: int = 0,
) -> list[Row]:
  """Summarises the outcomes of several experiments.

  Args:
    outcomes: for each experiment, its outcomes over the same seeds.
    metrics: which to summarise.
    resamples: how often to draw.
    seed: of the resampling.

  Returns:
    A row for each experiment and mode; the first row is what the others are
    compared with.

  Raises:
    InputError: a metric is missing, or runs were scored on other queries, or
      on the same ones otherwise damaged.
  """
  _check(outcomes, metrics)
  labels, first = outcomes[0][0].labels, outcomes[0]
  base = first, _modes(first)[0]

  def summarise(metric: str, one: _Scored, other: _Scored | None) -> Interval:
    values = _stack(*one, metric)
    # What a query without a right answer scores is NaN, for every system.
    given = np.isfinite(values).all(axis=0)
    options = {'groups': labels[given], 'seed': seed, 'resamples': resamples}
    if other is None:
      return bootstrap_interval(values[:, given], **options)
    against = _stack(*other, metric)
    return paired_bootstrap(values[:, given], against[:, given], **options)

  def all_metrics(one: _Scored, other: _Scored | None) -> dict[str, Interval]:
    return {metric: summarise(metric, one, other) for metric in metrics}

  rows = []
  for runs in outcomes:
    for mode in _modes(runs):
      own_solo = mode not in ('solo', CLASSIFIER) and 'solo' in _modes(runs)
      against = (first, mode) if mode == CLASSIFIER else base
      rows.append(
        Row(
          experiment=runs[0].experiment,
          mode=mode,
          parameters=runs[0].parameters,
          seeds=tuple(run.seed for run in runs),
          values=all_metrics((runs, mode), None),
          gains=(
            None
            if runs is first and mode == against[1]
            else all_metrics((runs, mode), against)
          ),
          mode_gains=(
            all_metrics((runs, mode), (runs, 'solo')) if own_solo else None
          ),
        )
      )
  return rows


def markdown_table(rows: Sequence[Row], *, metric: str) -> str:
  """Writes the rows of one metric as a Markdown table.

  Args:
    rows: see `comparison_rows`.
    metric: which of their metrics.

  Returns:
    The table, and under it a note where parameters are not equal.
  """
  first = rows[0]
  lines = [
    f'| {metric}, % | mode | mean [95 % interval] '
    f'| − {first.experiment} {first.mode} | − own solo | parameters | seeds |',
    '|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    cells = (
      row.experiment,
      row.mode,
      _interval(row.values[metric]),
      _difference(row.gains, metric),
      _difference(row.mode_gains, metric),
      f'{row.parameters:,}',
      ' '.join(str(seed) for seed in row.seeds),
    )
    lines.append(f'| {" | ".join(cells)} |')
  unequal = {
    row.experiment: row.parameters / first.parameters - 1
    for row in rows
    if abs(row.parameters / first.parameters - 1) > EQUAL_PARAMETERS
  }
  if unequal:
    listed = ', '.join(
      f'{name} {share:+.1%}' for name, share in unequal.items()
    )
    lines += ['', f'Parameters beside {first.experiment}: {listed}.']
  return '\n'.join(lines) + '\n'


def _modes(runs: Sequence[Outcome]) -> list[str]:
  """The modes that all runs of an experiment have, `solo` first."""
  shared = [m for m in runs[0].scores if all(m in run.scores for run in runs)]
  return sorted(shared, key=lambda mode: mode != 'solo')


def _stack(runs: Sequence[Outcome], mode: str, metric: str) -> np.ndarray:
  return np.stack([run.scores[mode][metric] for run in runs])


def _check(
  outcomes: Sequence[Sequence[Outcome]], metrics: Sequence[str]
) -> None:
  first, labels = outcomes[0][0], outcomes[0][0].labels
  seeds = [run.seed for run in outcomes[0]]
  for runs in outcomes:
    for run in runs:
      if not np.array_equal(run.labels, labels):
        raise InputError(
          f'{run.experiment} seed {run.seed} was scored on other queries than '
          f'{first.experiment}: compare experiments on one data set'
        )
      if run.split != first.split:
        raise InputError(
          f'{run.experiment} seed {run.seed} was scored on {run.split}, '
          f'{first.experiment} on {first.split}: compare scores of one split'
        )
      for mode, scores in run.scores.items():
        missing = [metric for metric in metrics if metric not in scores]
        if missing:
          raise InputError(
            f'--metrics {missing[0]} is not among the scores of '
            f'{run.experiment} in mode {mode}: {", ".join(scores)}'
          )
    if [run.seed for run in runs] != seeds:
      raise ValueError(f'{runs[0].experiment} has other seeds than {seeds}')


def _interval(value: Interval) -> str:
  return f'{value.mean:.1%} [{value.low:.1%}, {value.high:.1%}]'.replace(
    '%', ''
  )


def _difference(gains: Mapping[str, Interval] | None, metric: str) -> str:
  if gains is None:
    return ''
  gain = gains[metric]
  return f'{gain.mean:+.1%} [{gain.low:+.1%}, {gain.high:+.1%}]'.replace(
    '%', ''
  )
