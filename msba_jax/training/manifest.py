"""A list of the files of a directory with their SHA-256, checked on reading.

A directory without its list is one that was not finished; one whose files
differ from it is broken. Directories may be nested.

Attributes:
  MANIFEST: name of the list.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msba_jax.data.atomic import write_json

MANIFEST = 'manifest.json'


class BrokenError(ValueError):
  """A directory is unfinished, or not as it was written."""


def write_manifest(directory: Path, facts: Mapping[str, Any]) -> None:
  """Lists every file below a directory, and states further facts.

  Args:
    directory: what is listed; it is complete once the list stands.
    facts: JSON values, kept beside the list.
  """
  files = {name: _digest(directory / name) for name in _files(directory)}
  write_json(directory / MANIFEST, {'facts': dict(facts), 'files': files})


def check_manifest(directory: Path) -> dict[str, Any]:
  """Compares a directory with its list.

  Args:
    directory: with a manifest.

  Returns:
    The facts.

  Raises:
    BrokenError: says what is missing or differs.
  """
  try:
    with (directory / MANIFEST).open(encoding='utf-8') as file:
      manifest = json.load(file)
    listed, facts = dict(manifest['files']), dict(manifest['facts'])
  except FileNotFoundError:
    raise BrokenError(f'{directory} was not finished') from None
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise BrokenError(f'{directory / MANIFEST} is unreadable') from error
  found = set(_files(directory))
  for name in sorted(found.symmetric_difference(listed)):
    problem = 'is not in its manifest' if name in found else 'is missing'
    raise BrokenError(f'{directory / name} {problem}')
  for name, digest in listed.items():
    if _digest(directory / name) != digest:
      raise BrokenError(f'{directory / name} is not what was written')
  return facts


def _files(directory: Path) -> list[str]:
  paths = (path for path in directory.rglob('*') if path.is_file())
  names = sorted(path.relative_to(directory).as_posix() for path in paths)
  return [name for name in names if name != MANIFEST]


def _digest(path: Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
