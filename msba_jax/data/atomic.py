"""Files that are whole or as they were before, whenever the writer is stopped.

Attributes:
  write_atomically: bytes.
  write_json: a JSON value.
"""

import json
import os
from pathlib import Path
from typing import Any

from msba_jax.data.errors import InputError

__all__ = ['write_atomically', 'write_json']


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a file in one step: the old one stands until the new one does.

  A link stays a link, and the file that it leads to is replaced. What is there
  and no file, as `/dev/stdout` or a named pipe, is written to as it stands.

  Args:
    path: the file; folders above it are made.
    content: its bytes.

  Raises:
    InputError: a file cannot stand there.
  """
  goal = Path(path)
  if goal.is_dir():
    raise InputError(f'{goal} is a directory: name a file to write')
  if goal.exists() and not goal.is_file():
    goal.write_bytes(content)
    return
  goal = goal.resolve()
  try:
    goal.parent.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise InputError(
      f'{goal.parent} is no directory: name another file to write'
    ) from None
  partial = goal.with_name(f'{goal.name}.partial-{os.getpid()}')
  try:
    with open(partial, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, goal)
  finally:
    partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes JSON in one step, see `write_atomically`.

  Args:
    path: the file.
    value: what `json` can write.
  """
  text = json.dumps(value, indent=1, ensure_ascii=False)
  write_atomically(path, (text + '\n').encode())
