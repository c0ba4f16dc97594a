"""A data set that lies as `split/class/file` in a folder or a zip.

```
birds.zip
  train/ant/1.jpg …          training classes
  validation/… or val/…      optional; made from training classes otherwise
  test/cat/7.jpg …           all against all
  query/… and gallery/…      instead of test: queries are answered from gallery
```

`class/file` without splits works as well; classes are then divided by us, as
they are where training and test share classes (`msba_jax.data.splits`). Files
beside the splits, hidden files and what operating systems leave are passed
over. Everything else that is not an image in its class folder is an error: it
would be missing silently.

Attributes:
  FolderData: where the images lie, and how to split them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from msba_jax.data import images
from msba_jax.data.errors import InputError
from msba_jax.data.files import Entry, FileSource, open_store
from msba_jax.data.source import Splits
from msba_jax.data.splits import SplitData, SplitNames


@dataclasses.dataclass(frozen=True)
class FolderData(SplitData):
  """Images in a folder or a zip, as split/class/file or class/file."""

  path: str
  """Folder or zip."""

  splits: SplitNames = dataclasses.field(default_factory=SplitNames)
  """What the folders of the splits are called."""

  def open(self) -> Splits:
    """Lists the files and divides them.

    Returns:
      The splits.

    Raises:
      InputError: a split is missing, a class is empty, a file does not belong.
    """
    store = open_store(self.path)
    top, entries = _unwrap(store.entries(), self.splits.all())
    found = {e.name.split('/')[0] for e in entries if '/' in e.name}
    flat = not found & self.splits.all() and _is_flat(entries)
    roles = {}
    if not flat:
      roles = self.splits.roles(found, where=self.path, needed=self.own_splits)
      entries = [e for e in entries if e.name.split('/')[0] in roles]
    where = f'{self.path}/{top}'.rstrip('/')
    files = _files(entries, depth=1 if flat else 2, where=where)
    parts = [e.name.split('/') for e in files]
    names = sorted({part[-2] for part in parts})
    number = {name: i for i, name in enumerate(names)}
    source = FileSource(
      store,
      [e._replace(name=top + e.name) for e in files],
      [number[part[-2]] for part in parts],
      names,
      size=self.size,
      interpolation=self.interpolation,
    )
    role_of = np.array([roles.get(part[0], '') for part in parts])
    own = {r: np.flatnonzero(role_of == r) for r in roles.values()}
    return self.divide(source, own, name=self.path)


def _unwrap(
  entries: Sequence[Entry], names: set[str]
) -> tuple[str, list[Entry]]:
  """Passes through a single folder at the top, which zips often have."""
  tops = {e.name.split('/')[0] for e in entries if '/' in e.name}
  top = next(iter(tops), '') + '/'
  nested = any(e.name.count('/') > 1 and e.name[-1] == '/' for e in entries)
  if len(tops) != 1 or top[:-1] in names or not nested:
    return '', list(entries)
  below = [e for e in entries if e.name.startswith(top) and e.name != top]
  return top, [e._replace(name=e.name[len(top) :]) for e in below]


def _is_flat(entries: Sequence[Entry]) -> bool:
  """Whether images lie one folder deep, as in class/file."""
  return any(
    e.name.count('/') == 1 and images.is_image_name(e.name) for e in entries
  )


def _files(entries: Sequence[Entry], *, depth: int, where: str) -> list[Entry]:
  """The images, after a look at everything that is none."""
  folders, files = set(), []
  for entry in entries:
    parts = entry.name.rstrip('/').split('/')
    is_folder = entry.name.endswith('/')
    if is_folder and len(parts) == depth:
      folders.add(entry.name)
    elif len(parts) <= depth:
      if (
        not is_folder
        and len(parts) == depth
        and images.is_image_name(entry.name)
        and depth > 1
      ):
        raise InputError(
          f'{where}/{entry.name} lies in no class: move it into a class folder'
        )
    elif is_folder or len(parts) > depth + 1:
      raise InputError(
        f'{where}/{entry.name} lies too deep: images belong into '
        f'{"split/class" if depth == 2 else "class"}/file'
      )
    elif not images.is_image_name(entry.name):
      raise InputError(
        f'{where}/{entry.name} is no image of a known format: remove it'
      )
    else:
      files.append(entry)
  empty = folders - {e.name.rsplit('/', 1)[0] + '/' for e in files}
  if empty:
    raise InputError(
      f'{where}/{min(empty)} has no images: add some or remove the class'
    )
  return files
