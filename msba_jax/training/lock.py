"""One training at a time in a run directory.

Attributes:
  only_one: holds the directory while a block runs.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from msba_jax.data.errors import InputError

LOCK = 'lock'


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
  """Holds a directory; the system lets go of it however the process ends.

  On Windows, and on a file system that cannot lock, nothing is held.

  Args:
    directory: made if it is not there; keeps an empty file `lock`.

  Yields:
    Nothing.

  Raises:
    InputError: another process holds it.
  """
  if sys.platform == 'win32':
    yield
    return
  import fcntl

  directory.mkdir(parents=True, exist_ok=True)
  with (directory / LOCK).open('a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InputError(
        f'another process trains in {directory}; wait for it, stop it, or '
        'choose another directory'
      ) from None
    except OSError:
      pass
    yield
