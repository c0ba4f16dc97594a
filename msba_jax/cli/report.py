"""Writes one self-contained HTML page about a trained run.

The page shows queries with their results before and after re-ranking, who
looks at whom in a batch, the hardest queries, recall per class, curves,
configuration and environment. It opens anywhere and loads nothing.

Attributes:
  Options: the flags of `msba report`.
  run: writes the page.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

EXAMPLES = """\
  msba report runs/scenes_msba/seed0
  msba report runs/scenes_msba/seed0 --split test --out msba.html
"""
INTERRUPTED = 'A page that stood there before still stands.'


@dataclass(frozen=True)
class Options:
  """Flags of `msba report`."""

  run: Annotated[Path, Positional, arg(metavar='RUN')]
  """Directory of the trained run, as `msba train` made it."""
  split: Literal['validation', 'test'] = 'validation'
  """Which classes."""
  out: Path | None = None
  """The page; <run>/report-<split>.html by default."""


def run(options: Options) -> int:
  """Writes the page; 0 when it stands."""
  from msba_jax.training.report import report_run
  from msba_jax.training.run import load_run

  out = options.out or options.run / f'report-{options.split}.html'
  report_run(load_run(options.run), out, split=options.split)
  print(f'The report stands in {out}.')
  return 0
