"""Images that lie in a folder or in a zip, read without leaving it.

Both are listed once and read by name. A zip is read in place, by one handle
per thread. Names that leave the root (`..`, absolute paths, links to somewhere
else) are refused, as are links inside a zip and anything but regular files.

Attributes:
  Entry: name, size and a stamp that changes when the file does.
  FolderStore: the files below a folder.
  ZipStore: the entries of a zip.
  open_store: whichever of the two a path is.
  FileSource: labelled images in a store.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import zipfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from msba_jax.data import images
from msba_jax.data.errors import InputError
from msba_jax.data.source import Record

_IGNORED = frozenset({'__MACOSX', 'Thumbs.db', 'desktop.ini'})


class Entry(NamedTuple):
  """One file or folder of a store.

  Attributes:
    name: path below the root, with `/`; a folder ends in `/`.
    size: bytes.
    stamp: modification time (folder) or CRC (zip).
  """

  name: str
  size: int
  stamp: int


def _ignored(part: str) -> bool:
  return part.startswith('.') or part in _IGNORED


def check_inside(name: str, *, where: str) -> str:
  """Refuses a path that leaves the root it is meant to lie below.

  Args:
    name: a path that somebody else wrote.
    where: what the message calls its origin.

  Returns:
    The path with `/` as separator and without `.` parts.

  Raises:
    InputError: the path is empty, absolute, or has a `..` part.
  """
  plain = name.replace('\\', '/')
  parts = [part for part in plain.split('/') if part not in ('', '.')]
  absolute = plain.startswith('/') or plain[1:2] == ':'
  if not parts or absolute or '..' in parts or '\0' in plain:
    raise InputError(
      f'{where}: the path {name!r} leaves the root: use a path below it'
    )
  return '/'.join(parts)


class FolderStore:
  """The files below a folder.

  Args:
    path: the folder.

  Raises:
    InputError: the folder cannot be listed.
  """

  def __init__(self, path: str):
    self.path = path
    self._root = os.path.realpath(path)

  def entries(self) -> list[Entry]:
    """Files and folders down to three levels below the root, sorted.

    Raises:
      InputError: a link leaves the root, or something is no regular file.
    """
    found: list[Entry] = []
    pending = ['']
    while pending:
      folder = pending.pop()
      for entry in self._scan(folder):
        name = f'{folder}{entry.name}'
        if entry.is_symlink():
          self._check_link(name)
        if entry.is_dir():
          found.append(Entry(f'{name}/', 0, 0))
          if name.count('/') < 3:
            pending.append(f'{name}/')
        elif entry.is_file():
          status = entry.stat()
          found.append(Entry(name, status.st_size, status.st_mtime_ns))
        else:
          raise InputError(f'{self.path}/{name} is no regular file: remove it')
    return sorted(found)

  def entry(self, name: str) -> Entry | None:
    """One file by its name, or None.

    Raises:
      InputError: the name leads out of the root, or to no regular file.
    """
    path = os.path.join(self._root, name)
    if not os.path.lexists(path):
      return None
    self._check_link(name)
    try:
      status = os.stat(path)
    except OSError as error:
      raise InputError(f'{self.path}/{name} cannot be read ({error})') from None
    if not stat.S_ISREG(status.st_mode):
      raise InputError(f'{self.path}/{name} is no regular file: remove it')
    return Entry(name, status.st_size, status.st_mtime_ns)

  def read(self, name: str) -> bytes:
    """The bytes of a file.

    Raises:
      InputError: it cannot be read, or is larger than `images.MAX_BYTES`.
    """
    try:
      with open(os.path.join(self._root, name), 'rb') as file:
        _check_size(f'{self.path}/{name}', os.fstat(file.fileno()).st_size)
        return file.read()
    except OSError as error:
      raise InputError(
        f'{self.path}/{name} cannot be read ({error.strerror}): replace or '
        'remove it'
      ) from error

  def _scan(self, folder: str) -> list[os.DirEntry[str]]:
    try:
      with os.scandir(os.path.join(self._root, folder)) as scan:
        return [entry for entry in scan if not _ignored(entry.name)]
    except OSError as error:
      raise InputError(
        f'{self.path}/{folder} cannot be listed ({error.strerror}): check '
        'its permissions'
      ) from error

  def _check_link(self, name: str) -> None:
    goal = os.path.realpath(os.path.join(self._root, name))
    if os.path.commonpath([self._root, goal]) != self._root:
      raise InputError(
        f'{self.path}/{name} is a link that leaves {self.path}: put the file '
        'itself there'
      )


class ZipStore:
  """The entries of a zip; nothing is extracted.

  Args:
    path: the zip.

  Raises:
    InputError: the file is no zip, or its entries are not to be trusted.
  """

  def __init__(self, path: str):
    self.path = path
    self._local = threading.local()
    self._infos = {}
    for info in self._archive().infolist():
      name = check_inside(info.filename, where=path)
      if any(_ignored(part) for part in name.split('/')):
        continue
      name += '/' if info.is_dir() else ''
      if name in self._infos and not info.is_dir():
        raise InputError(f'{path} has {name} twice: make the zip anew')
      if stat.S_ISLNK(info.external_attr >> 16):
        raise InputError(
          f'{path} has the link {name}: put the file itself there'
        )
      if info.flag_bits & 1:
        raise InputError(f'{path} is encrypted ({name}): decrypt it first')
      self._infos[name] = info

  def entries(self) -> list[Entry]:
    """Files and folders, those only implied by a file too, sorted."""
    folders = set()
    for name in self._infos:
      parts = name.rstrip('/').split('/')
      folders.update('/'.join(parts[:i]) + '/' for i in range(1, len(parts)))
    files = [Entry(n, i.file_size, i.CRC) for n, i in self._infos.items()]
    missing = folders - self._infos.keys()
    return sorted(files + [Entry(name, 0, 0) for name in missing])

  def entry(self, name: str) -> Entry | None:
    """One file by its name, or None."""
    info = self._infos.get(name)
    return None if info is None else Entry(name, info.file_size, info.CRC)

  def read(self, name: str) -> bytes:
    """The bytes of an entry, their CRC verified.

    Raises:
      InputError: the entry is broken or larger than `images.MAX_BYTES`.
    """
    info = self._infos[name]
    _check_size(f'{self.path}/{name}', info.file_size)
    try:
      return self._archive().read(info)
    except (
      OSError,
      EOFError,
      RuntimeError,  # NotImplementedError: unknown compression
      zipfile.BadZipFile,
      zlib.error,
    ) as error:
      raise InputError(
        f'{self.path}/{name} is broken ({error}): make the zip anew'
      ) from error

  def _archive(self) -> zipfile.ZipFile:
    """This thread's own handle; a shared one would queue its readers."""
    archive = getattr(self._local, 'archive', None)
    if archive is None:
      try:
        archive = zipfile.ZipFile(self.path)
      except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(
          f'{self.path} cannot be read as a zip ({error}): copy it again'
        ) from error
      self._local.archive = archive
    return archive


Store = FolderStore | ZipStore


def open_store(path: str) -> Store:
  """Opens a folder or a zip.

  Args:
    path: where it lies.

  Returns:
    The store.

  Raises:
    InputError: there is nothing, or neither a folder nor a zip.
  """
  path = os.path.expanduser(path)
  if os.path.isdir(path):
    return FolderStore(path)
  if not os.path.exists(path):
    raise InputError(f'{path} does not exist: give a folder or a zip')
  return ZipStore(path)


def _check_size(name: str, size: int) -> None:
  if size > images.MAX_BYTES:
    raise InputError(
      f'{name} has {size:,} bytes, more than {images.MAX_BYTES:,}: scale it '
      'down or remove it'
    )


class FileSource:
  """Labelled images in a folder or zip, decoded when asked for.

  Args:
    store: where they lie.
    entries: which files; their names are the ids.
    labels: index of each file's class.
    class_names: the classes.
    size: side in pixels to which images are cropped and resized.
    interpolation: the filter of the resizing.

  Raises:
    ValueError: there are not as many labels as entries.
  """

  def __init__(
    self,
    store: Store,
    entries: Sequence[Entry],
    labels: np.ndarray | Sequence[int],
    class_names: Sequence[str],
    *,
    size: int,
    interpolation: images.Interpolation = 'bicubic',
  ):
    self._store = store
    self._entries = tuple(entries)
    self._size = size
    self._interpolation: images.Interpolation = interpolation
    self.labels = np.asarray(labels, np.int32)
    self.class_names = tuple(class_names)
    self.ids = tuple(entry.name for entry in self._entries)
    if self.labels.shape != (len(self._entries),):
      raise ValueError(f'{len(self._entries)=} but {self.labels.shape=}')

  def __len__(self) -> int:
    return len(self._entries)

  def __getitem__(self, index: int) -> Record:
    name = self._entries[index].name
    image = images.decode_image(
      self._store.read(name),
      name=f'{self._store.path}/{name}',
      size=self._size,
      interpolation=self._interpolation,
    )
    return Record(image=image, label=int(self.labels[index]))

  def fingerprint(self) -> str:
    """Hexadecimal SHA-256 over names, sizes and stamps of the files."""
    digest = hashlib.sha256(
      f'{self._size}\n{self._interpolation}\n{self.class_names}\n'.encode()
    )
    digest.update(self.labels.tobytes())
    for entry in self._entries:
      line = f'{entry.name}\0{entry.size}\0{entry.stamp}\n'
      digest.update(line.encode('utf-8', 'surrogateescape'))
    return digest.hexdigest()
