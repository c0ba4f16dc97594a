"""A data set that is listed in a CSV file.

```
file,label,split,role
photos/1.jpg,sparrow,train,
photos/7.jpg,owl,test,query
photos/8.jpg,owl,test,gallery
```

`split` is train, validation (or val) or test; without the column all images are
divided by class. `role` is optional: where the test rows have one, queries are
answered from the gallery, else all against all. Other columns are passed over.

Attributes:
  CsvData: where the list and the images lie, and how to split them.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from msba_jax.data.errors import InputError
from msba_jax.data.files import (
  Entry,
  FileSource,
  Store,
  check_inside,
  open_store,
)
from msba_jax.data.source import Splits
from msba_jax.data.splits import SplitData

_SPLITS = {
  'train': 'train',
  'validation': 'validation',
  'val': 'validation',
  'test': 'test',
}
_ROLES = ('', 'query', 'gallery')


class _Row(NamedTuple):
  line: int
  file: str
  label: str
  part: str


@dataclasses.dataclass(frozen=True)
class CsvData(SplitData):
  """Images listed in a CSV file with the columns file, label, split, role."""

  path: str
  """The CSV file, UTF-8, with a header."""

  root: str | None = None
  """Folder or zip that the files are named relative to; default: the folder of
  the CSV file."""

  def open(self) -> Splits:
    """Reads the list, checks that its files are there, and divides them.

    Returns:
      The splits.

    Raises:
      InputError: a line is wrong; the message has its number.
    """
    path = os.path.expanduser(self.path)
    rows = list(_rows(path))
    root = self.root or os.path.dirname(path) or '.'
    store = open_store(root)
    names = sorted({row.label for row in rows})
    number = {name: i for i, name in enumerate(names)}
    source = FileSource(
      store,
      _entries(rows, store, path),
      [number[row.label] for row in rows],
      names,
      size=self.size,
      interpolation=self.interpolation,
    )
    part_of = np.array([row.part for row in rows])
    parts = {
      part: np.flatnonzero(part_of == part)
      for part in dict.fromkeys(row.part for row in rows)
      if part
    }
    if self.own_splits and parts:
      _check_parts(rows, parts, path)
    return self.divide(source, parts, name=self.path)


def _rows(path: str) -> Iterator[_Row]:
  """The lines of the list, each checked by itself."""
  try:
    with open(path, encoding='utf-8-sig', newline='') as file:
      reader = csv.DictReader(file, restval=None, strict=True)
      header = reader.fieldnames or ()
      for column in ('file', 'label'):
        if column not in header:
          raise InputError(
            f'{path}, line 1: there is no column {column!r}: the header must '
            'be file,label,split or file,label,split,role'
          )
      for row in reader:
        yield _row(row, reader.line_num, path)
      if reader.line_num < 2:
        raise InputError(f'{path} lists no images: add a line for each')
  except OSError as error:
    raise InputError(
      f'{path} cannot be read ({error.strerror}): give a CSV file'
    ) from error
  except (UnicodeDecodeError, csv.Error) as error:
    raise InputError(
      f'{path} is no CSV file in UTF-8 ({error}): save it as one'
    ) from error


def _row(row: dict, line: int, path: str) -> _Row:
  where = f'{path}, line {line}'
  if None in row or None in row.values():
    raise InputError(
      f'{where}: it has {"more" if None in row else "fewer"} fields than the '
      'header: quote commas, add what is missing'
    )
  label, split, role = (
    (row.get(column) or '').strip() for column in ('label', 'split', 'role')
  )
  if not label:
    raise InputError(f'{where}: the label is empty: name a class')
  if 'split' in row and split not in _SPLITS:
    raise InputError(
      f'{where}: split {split!r} is none of {", ".join(_SPLITS)}: use one'
    )
  if role not in _ROLES or (role and split != 'test'):
    raise InputError(
      f'{where}: role {role!r} in split {split!r}: use query or gallery in '
      'test, and nothing elsewhere'
    )
  file = check_inside(row['file'].strip(), where=where)
  return _Row(line, file, label, role or _SPLITS.get(split, ''))


def _check_parts(
  rows: list[_Row], parts: dict[str, np.ndarray], path: str
) -> None:
  """Whether the splits that an experiment needs are there."""
  roles = {'query', 'gallery'} & parts.keys()
  if 'test' in parts and roles:
    line = rows[int(parts['test'][0])].line
    raise InputError(
      f'{path}, line {line}: role is empty, but other test images have one: '
      'give all of them one, or none'
    )
  wanted = ('query', 'gallery') if roles else ('test',)
  for part in ('train', *wanted):
    if part not in parts:
      raise InputError(
        f'{path} has no {part} images: add some, or divide all images by '
        "class_split='random'"
      )


def _entries(rows: list[_Row], store: Store, path: str) -> list[Entry]:
  """The files of the rows, in their order."""
  entries: list[Entry] = []
  lines: dict[str, int] = {}
  for row in rows:
    entry = store.entry(row.file)
    if entry is None:
      raise InputError(
        f'{path}, line {row.line}: there is no {store.path}/{row.file}: '
        'correct the name, or set root'
      )
    if row.file in lines:
      raise InputError(
        f'{path}, line {row.line}: {row.file} stands in line '
        f'{lines[row.file]} already: remove one'
      )
    lines[row.file] = row.line
    entries.append(entry)
  return entries
