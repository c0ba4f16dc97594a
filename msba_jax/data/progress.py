"""How far something is, on the terminal or in the log.

Attributes:
  progress_bar: a bar that a terminal sees move, and a log every ten seconds.
"""

import sys

from tqdm import tqdm

__all__ = ['progress_bar']

_LOG_SECONDS = 10.0


def progress_bar(
  total: int, *, desc: str, unit: str, initial: int = 0, disable: bool = False
) -> tqdm:
  """Makes a bar on standard error.

  Args:
    total: how many there are.
    desc: what is done.
    unit: what is counted.
    initial: how many are done already.
    disable: shows nothing.

  Returns:
    A context manager with `update(count)`, `set_postfix` and `close()`.
  """
  return tqdm(
    total=total,
    desc=desc,
    unit=unit,
    initial=initial,
    disable=disable,
    mininterval=0.1 if sys.stderr.isatty() else _LOG_SECONDS,
  )
