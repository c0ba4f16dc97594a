"""Scores a trained run on images that it never saw.

Prints the mean of each metric in each mode, in per cent, and writes
`evaluation.json` into the run directory. Make choices on `validation`; look at
`test` once. Both have classes of their own; `seen` are other images of the
training classes (`--data.held-out-images`), where the mode `classifier` gives
the accuracy of the classification as recall@1. With `--corruption` and
`--severity` queries and gallery are damaged first, always in the same way; the
scores are kept beside those of sound images.

Attributes:
  Options: the flags of `msba evaluate`.
  run: scores and prints.
  score_table: scores as lines of text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

EXAMPLES = """\
  msba evaluate runs/scenes_msba/seed0
  msba evaluate runs/scenes_msba/seed0 --split test
  msba evaluate runs/scenes_msba/seed0 --modes solo neighbours
  msba evaluate runs/scenes_msba/seed0 --corruption occlusion --severity 3
"""
INTERRUPTED = 'What evaluation.json held before, it still holds.'


@dataclass(frozen=True)
class Options:
  """Flags of `msba evaluate`."""

  run: Annotated[Path, Positional, arg(metavar='RUN')]
  """Directory of the trained run, as `msba train` made it."""
  split: Literal['validation', 'test', 'seen'] = 'validation'
  """Which images; seen are held-out ones of the training classes."""
  modes: tuple[Literal['solo', 'neighbours', 'memory', 'refinement'], ...] = ()
  """How images are asked; all that apply to the model by default."""
  corruption: str | None = None
  """Damage all images first: gaussian_noise, gaussian_blur, brightness,
  contrast, pixelate or occlusion."""
  severity: int | None = None
  """How much damage, 1 to 5."""


def run(options: Options) -> int:
  """Scores; 0 when evaluation.json is written."""
  from msba_jax.data.corrupted import choose_corruption
  from msba_jax.training.results import split_title
  from msba_jax.training.run import evaluate_run, load_run

  corruption = choose_corruption(options.corruption, options.severity)
  trained = load_run(options.run)
  result = evaluate_run(
    trained,
    split=options.split,
    corruption=corruption,
    modes=options.modes or None,
  )
  title = split_title(options.split, corruption)
  print(
    f'{title}: {len(result.labels):,} queries, '
    f'{len(set(result.labels.tolist())):,} classes, per cent'
  )
  print(score_table(result.scores))
  print(f'batch sensitivity {result.batch_sensitivity:.4f}')
  print(f'Written to {options.run / "evaluation.json"}.')
  return 0


def score_table(scores: Mapping[Any, Mapping[str, float]]) -> str:
  """Mean scores as a table: a line for each mode, per cent.

  Args:
    scores: by mode, by metric; every mode has the same metrics.

  Returns:
    Lines of text.
  """
  metrics = list(next(iter(scores.values())))
  first = max(len(mode) for mode in scores)
  widths = [max(len(name), 6) for name in metrics]
  lines = [
    ' ' * first
    + ''.join(f'  {n:>{w}}' for n, w in zip(metrics, widths, strict=True))
  ]
  for mode, means in scores.items():
    cells = (
      f'  {100 * means[n]:>{w}.2f}'
      for n, w in zip(metrics, widths, strict=True)
    )
    lines.append(f'{mode:<{first}}' + ''.join(cells))
  return '\n'.join(lines)
