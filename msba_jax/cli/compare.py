"""Trains and scores several experiments over several seeds, and compares them.

Every finished run leaves one JSON file with the scores of each query under
`results/`; runs whose file stands are not run again. The table has the mean
over the seeds, an interval by resampling seeds, classes and queries, and the
paired difference to the first experiment. What is not a flag of `compare`
overrides fields of every experiment. With `--corruption` and `--severity` the
runs that stand are scored once more, on damaged images.

Attributes:
  Options: the flags of `msba compare` itself.
  run: runs what is missing and prints the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

EXAMPLES = """\
  msba compare experiments/scenes_backbone.py experiments/scenes_msba.py
  msba compare a.py b.py c.py --seeds 0 1 2 3 4 --split test
  msba compare a.py b.py --seeds 0 1 2 --markdown table.md --steps 800
  msba compare a.py b.py --split test --corruption occlusion --severity 3
  msba compare a.py b.py --data.train-share 0.1
"""
INTERRUPTED = (
  'The results of finished runs stay; the same command goes on from the last '
  'checkpoint of the run it was at.'
)
TAKES_OVERRIDES = True


@dataclass(frozen=True)
class Options:
  """Flags of `msba compare`."""

  experiments: tyro.conf.Positional[tuple[str, ...]]
  """Experiment files; the others are compared with the first."""
  seeds: tuple[int, ...] = (0, 1, 2)
  """Of the trainings; every experiment is trained with each."""
  split: Literal['validation', 'test', 'seen'] = 'validation'
  """On which images to score: choose on validation, look at test once. seen
  are held-out images of the training classes, for classification."""
  corruption: str | None = None
  """Damage all images before they are scored: gaussian_noise, gaussian_blur,
  brightness, contrast, pixelate or occlusion. The runs stay as they are."""
  severity: int | None = None
  """How much damage, 1 to 5."""
  metrics: tuple[str, ...] = ('recall@1', 'map@r', 'ap')
  """What the table shows."""
  results: Path = Path('results')
  """Directory of the result files."""
  runs_dir: Path = Path('runs')
  """Directory of the run directories."""
  markdown: Path | None = None
  """Also write the table into this file."""


def run(options: Options, overrides: Sequence[str]) -> int:
  """Compares; 0 when the table is printed."""
  from msba_jax.training.distributed import initialize

  initialize()
  from msba_jax.data.corrupted import choose_corruption
  from msba_jax.training.compare import Comparison, compare
  from msba_jax.training.comparison_table import (
    comparison_rows,
    markdown_table,
  )
  from msba_jax.training.results import split_title

  corruption = choose_corruption(options.corruption, options.severity)
  comparison = Comparison(
    experiments=options.experiments,
    seeds=options.seeds,
    overrides=tuple(overrides),
    split=options.split,
    corruption=corruption,
    results=options.results,
    runs=options.runs_dir,
  )
  outcomes = compare(comparison, say=print)
  rows = comparison_rows(outcomes, metrics=options.metrics)
  text = '\n'.join(
    (
      f'{split_title(options.split, corruption)}\n',
      *(markdown_table(rows, metric=metric) for metric in options.metrics),
    )
  )
  print(f'\n{text}', end='')
  if options.markdown is not None:
    from msba_jax.data.atomic import write_atomically

    write_atomically(options.markdown, text.encode())
    print(f'\nThe table stands in {options.markdown}.')
  return 0
