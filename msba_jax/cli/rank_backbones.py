"""Ranks backbones on your own images, of which only a few are trained.

A candidate is an experiment file, FILE:VARIANT where one file holds several:
backbones, layers of one, combinations. Each is scored by what its backbone
knows before the training: A, how well it tells the classes of a sample apart
(and agrees with the backbones of `--references`), and C, how well it finds
the same place in a picture and its warp. As many as asked for are trained,
spread over A and C; a polynomial that is fitted to them predicts the others.
What is not a flag here overrides fields of every experiment.

Attributes:
  Options: the flags of `msba rank-backbones` itself.
  run: ranks, prints, and writes ranking.json and ranking.png.
  ranking_table: a ranking as lines of text.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
  from msba_jax.analysis.ranking import Ranking

EXAMPLES = """\
  msba rank-backbones photos/ --candidates a.py b.py c.py d.py e.py
  msba rank-backbones photos.zip --candidates a.py:wide a.py:deep b.py c.py \\
    --trainings 2 --steps 500
  msba rank-backbones --candidates experiments/backbones.py:{narrow,wide} \\
    experiments/scenes_msba.py --trainings 2 --output ranking
"""
INTERRUPTED = (
  'Scores and finished trainings stay; the same command goes on from the last '
  'checkpoint of the training it was at.'
)
TAKES_OVERRIDES = True


@dataclass(frozen=True)
class Options:
  """Flags of `msba rank-backbones` itself."""

  candidates: tuple[str, ...]
  """Experiment files to rank, two or more."""
  images: Annotated[Path | None, Positional, arg(metavar='IMAGES')] = None
  """Folder or zip of images that all candidates use; without it, each has the
  data of its experiment."""
  references: tuple[str, ...] = ()
  """Experiment files whose backbones tokens are aligned with, beside the
  classes."""
  trainings: int = 4
  """How many candidates are trained."""
  sample: int = 600
  """How many training images are looked at for A."""
  pairs: int = 200
  """How many of these are warped for C."""
  warm_up: int = 0
  """Steps that each candidate is trained before it is scored: for backbones
  that begin at random, of which only the shape is known."""
  seed: int = 0
  """Of the sample, of what is trained, and of the trainings."""
  metric: Literal['ap', 'map@r', 'recall@1'] = 'ap'
  """What is predicted: retrieval on validation classes, images alone."""
  confidence: float = 0.8
  """Of the intervals; of n trainings at most n / (n + 1)."""
  ridge: float = 0.0
  """Draws the polynomial towards a constant; 0.01 predicts better where many
  are trained, 0 finds the best with fewer trainings."""
  output: Path = Path('ranking')
  """Directory of all that is kept."""


def run(options: Options, overrides: Sequence[str]) -> int:
  """Ranks; 0 when ranking.json is written."""
  from msba_jax.analysis.rank import rank_backbones
  from msba_jax.analysis.ranking import Request
  from msba_jax.analysis.ranking_picture import ranking_picture
  from msba_jax.data.atomic import write_atomically, write_json
  from msba_jax.training.distributed import initialize

  initialize()
  path = [] if options.images is None else ['--data.path', str(options.images)]
  ranking = rank_backbones(
    Request(
      candidates=options.candidates,
      overrides=(*path, *overrides),
      references=options.references,
      trainings=options.trainings,
      images=options.sample,
      pairs=options.pairs,
      warm_up=options.warm_up,
      seed=options.seed,
      metric=options.metric,
      confidence=options.confidence,
      ridge=options.ridge,
      output=options.output,
    ),
    say=print,
  )
  print(f'\n{ranking_table(ranking)}')
  write_atomically(options.output / 'ranking.png', ranking_picture(ranking))
  write_json(
    options.output / 'ranking.json', _finite(dataclasses.asdict(ranking))
  )
  print(f'\nWritten to {options.output / "ranking.json"} and ranking.png.')
  return 0


def ranking_table(ranking: 'Ranking') -> str:
  """A ranking as a table, per cent, with what it is worth below.

  Args:
    ranking: from `rank_backbones`.

  Returns:
    Lines of text.
  """
  width = max(9, *(len(row.name) for row in ranking.candidates))
  lines = [
    f'{"":>4}{"candidate":<{width}}{"A":>8}{"C":>8}{"predicted":>11}'
    f'  {f"interval of {100 * ranking.confidence:g} %":<20}{"trained":>8}'
    f'{"in top 3":>10}'
  ]
  for place, row in enumerate(ranking.candidates, start=1):
    ends = 'unknown'
    if math.isfinite(row.low) and math.isfinite(row.high):
      ends = f'[{100 * row.low:.1f}, {100 * row.high:.1f}]'
    trained = '' if row.measured is None else f'{100 * row.measured:.2f}'
    lines.append(
      f'{place:>3} {row.name:<{width}}{row.alignment:>8.3f}'
      f'{row.correspondence:>8.3f}{100 * row.predicted:>11.2f}  {ends:<20}'
      f'{trained:>8}{f"{100 * row.in_top:.0f} %":>10}'
    )
  lines += [
    '',
    f'{ranking.metric} in per cent. In top 3: in how many of the fits that '
    'leave out one training.',
    'R² of the fit, and with one training left out:',
    *(
      f'  {name:<8} {_number(ranking.r_squared[name])} '
      f'{_number(ranking.leave_one_out_r_squared[name])}'
      for name in ranking.r_squared
    ),
    f'By A alone: {", ".join(ranking.by_alignment)}',
  ]
  return '\n'.join(lines)


def _finite(value: Any) -> Any:
  """None in the place of what JSON has no number for."""
  if isinstance(value, dict):
    return {name: _finite(part) for name, part in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(part) for part in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _number(value: float) -> str:
  return 'unknown' if math.isnan(value) else f'{value:7.3f}'
