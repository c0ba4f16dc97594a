"""Directories that are there whole or not at all, and hashed file by file.

A directory is built beside its goal, forced to the disk, and takes the place
of what stood there in one rename. An interruption at any moment leaves the
old one as it was.

Attributes:
  MANIFEST: name of the file that lists the others; a directory without it is
    one that was not finished.
  BrokenError: a directory is unfinished, or not as it was written.
  atomic_directory: builds a directory and puts it in its place at the end.
  write_manifest: lists size and SHA-256 of every file.
  read_manifest: reads the list and checks every file against it.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from msba_jax.data.atomic import write_json
from msba_jax.data.errors import InputError

__all__ = [
  'MANIFEST',
  'BrokenError',
  'atomic_directory',
  'read_manifest',
  'write_manifest',
]

MANIFEST = 'manifest.json'


class BrokenError(InputError):
  """A directory is unfinished, or not as it was written."""


@contextlib.contextmanager
def atomic_directory(goal: str | os.PathLike[str]) -> Iterator[Path]:
  """Gives a new directory that takes the place of `goal` at the end.

  What stood at `goal` is exchanged in one system call on Linux and macOS. On
  other systems it is renamed away first; a stop between the two renames leaves
  it as `<goal>.old-<process>`, and the next call puts it back.

  Args:
    goal: where the directory shall stand. A directory that stands there is
      replaced if it has a manifest or is empty.

  Yields:
    The directory to fill.

  Raises:
    InputError: something else stands at `goal`.
  """
  goal = Path(goal).resolve()
  _sweep(goal)
  _check_replaceable(goal)
  goal.parent.mkdir(parents=True, exist_ok=True)
  partial = goal.with_name(f'{goal.name}.partial-{os.getpid()}')
  partial.mkdir()
  try:
    yield partial
    for path in (*partial.iterdir(), partial):
      _sync(path)
    _check_replaceable(goal)
    _put_in_place(partial, goal)
    _sync(goal.parent)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def write_manifest(directory: Path, facts: Mapping[str, Any]) -> None:
  """Writes `manifest.json`: the facts, and size and SHA-256 of every file.

  Args:
    directory: its files may be nested; it is complete once the list stands.
    facts: what else to write; JSON values, no key `files`.
  """
  files = {
    path.relative_to(directory).as_posix(): {
      'bytes': path.stat().st_size,
      'sha256': _sha256(path),
    }
    for path in sorted(directory.rglob('*'))
    if path.is_file() and path != directory / MANIFEST
  }
  write_json(directory / MANIFEST, {**facts, 'files': files})


def read_manifest(
  directory: Path, *, verify: Literal['hashes', 'sizes'] = 'hashes'
) -> dict[str, Any]:
  """Reads `manifest.json` and checks the files that it lists.

  Args:
    directory: as `write_manifest` left it.
    verify: `hashes` reads every file whole; `sizes` looks at sizes alone.

  Returns:
    What the manifest says.

  Raises:
    BrokenError: a file is missing, or is not what was written.
  """
  path = directory / MANIFEST
  try:
    manifest = json.loads(path.read_text(encoding='utf-8'))
    listed = {
      str(name): (int(entry['bytes']), str(entry['sha256']))
      for name, entry in manifest['files'].items()
    }
  except (FileNotFoundError, NotADirectoryError):
    raise BrokenError(
      f'{directory} was not finished, it has no {MANIFEST}'
    ) from None
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise BrokenError(f'{path} cannot be read ({error})') from error
  for name, (size, sha256) in listed.items():
    _check_file(directory, name, size, sha256 if verify == 'hashes' else None)
  return manifest


def _check_file(
  directory: Path, name: str, size: int, sha256: str | None
) -> None:
  path = directory / name
  if PurePosixPath(name).is_absolute() or '..' in PurePosixPath(name).parts:
    raise BrokenError(f'{directory / MANIFEST} lists {name!r}, no file of it')
  if not path.is_file():
    raise BrokenError(f'{path} is missing')
  if path.stat().st_size != size:
    raise BrokenError(
      f'{path} has {path.stat().st_size} bytes where {size} were written'
    )
  if sha256 is not None and _sha256(path) != sha256:
    raise BrokenError(f'{path} is not what was written, its SHA-256 differs')


def _sha256(path: Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _sync(path: Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _check_replaceable(goal: Path) -> None:
  if not goal.exists():
    return
  if not goal.is_dir():
    raise InputError(f'{goal} is a file: name a directory')
  if not (goal / MANIFEST).is_file() and any(goal.iterdir()):
    raise InputError(
      f'{goal} is not empty and has no {MANIFEST}, so it is not replaced: name '
      'another directory'
    )


def _put_in_place(new: Path, goal: Path) -> None:
  """Renames `new` to `goal`; what stood there is left at `new` or removed."""
  if not goal.exists():
    new.rename(goal)
    return
  if _exchange(new, goal):
    return
  old = goal.with_name(f'{goal.name}.old-{os.getpid()}')
  goal.rename(old)
  try:
    new.rename(goal)
  except BaseException:
    old.rename(goal)
    raise
  shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
  """Exchanges two names in one step; False if the system cannot."""
  names = os.fsencode(one), os.fsencode(other)
  if sys.platform == 'linux':
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    call = getattr(ctypes.CDLL(None), 'renameat2', None)
    arguments = (here, names[0], here, names[1], exchange)
  elif sys.platform == 'darwin':
    call = getattr(ctypes.CDLL(None), 'renamex_np', None)
    arguments = (*names, 2)  # RENAME_SWAP
  else:
    return False
  return call is not None and call(*arguments) == 0


def _sweep(goal: Path) -> None:
  """Puts back, or removes, what processes that are gone left beside `goal`."""
  if not goal.parent.is_dir():
    return
  pattern = re.compile(re.escape(goal.name) + r'\.(partial|old)-(\d+)')
  for path in sorted(goal.parent.iterdir()):
    match = pattern.fullmatch(path.name)
    if match is None or _is_running(int(match[2])):
      continue
    if match[1] == 'old' and not goal.exists():
      path.rename(goal)
    else:
      shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
  if process == os.getpid():
    return False
  if os.name != 'posix':  # signal 0 would end the process there
    return True
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except (PermissionError, OverflowError):
    return True
  return True
