"""Every image of a source decoded once.

Small images cost more to decode than to keep: 25,000 of 64×64 are 307 MB. They
are decoded into one uint8 array, in memory or as a `.npy` file that is mapped
into memory and found again the next time. The file is written aside and moved
into place, its name is a hash of what it was made from, and its content is
verified when it is found again; a file that fails is made anew.

Attributes:
  CachedSource: a source whose pictures lie in one array.
  cached: a cached source where one is asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from msba_jax.data.errors import InputError
from msba_jax.data.progress import progress_bar
from msba_jax.data.source import Fingerprinted, Record, Source

_LOG = logging.getLogger(__name__)
_CHUNK = 64
_VERSION = 1


class CachedSource:
  """A source whose pictures are decoded once, all to the same size.

  Args:
    source: what to decode. With a directory it must be `Fingerprinted`.
    directory: where the decoded pictures are kept; None keeps them in memory.
    threads: how many threads decode.
    progress: whether a progress bar is shown.

  Raises:
    InputError: an image cannot be decoded, or the file not be written.
    TypeError: a directory is given for a source without a fingerprint.
  """

  def __init__(
    self,
    source: Source,
    directory: str | None = None,
    *,
    threads: int = 2,
    progress: bool = True,
  ):
    self.labels = source.labels
    self.class_names = source.class_names
    self.ids: Sequence[str] = source.ids
    self._key = None
    if isinstance(source, Fingerprinted):
      self._key = hashlib.sha256(
        f'{_VERSION}\n{source.fingerprint()}'.encode()
      ).hexdigest()
    if directory is None:
      self.images = _decode(source, _in_memory, threads, progress)
      self.images.flags.writeable = False
    elif self._key is None:
      raise TypeError(f'{type(source).__name__} has no fingerprint()')
    else:
      directory = os.path.expanduser(directory)
      goal = os.path.join(directory, f'{self._key[:32]}.npy')
      images = _reopen(goal, len(source))
      if images is None:
        _write(source, goal, threads, progress)
        images = np.load(goal, mmap_mode='r')
      self.images = images

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> Record:
    return Record(image=self.images[index], label=int(self.labels[index]))

  def fingerprint(self) -> str:
    """Hexadecimal SHA-256 of what the pictures were made from.

    Raises:
      TypeError: the source below has none.
    """
    if self._key is None:
      raise TypeError('the cached source has no fingerprint()')
    return self._key


def cached(source: Source, *, keep: bool, directory: str | None) -> Source:
  """Wraps a source in a `CachedSource` where one is asked for.

  Args:
    source: what may be cached.
    keep: whether to keep decoded pictures.
    directory: where; given, they are kept whatever `keep` says.

  Returns:
    The source itself, or its cached form.
  """
  if directory is None and not keep:
    return source
  return CachedSource(source, directory)


def _in_memory(shape: tuple[int, ...]) -> np.ndarray:
  return np.empty(shape, np.uint8)


def _decode(
  source: Source,
  allocate: Callable[[tuple[int, ...]], np.ndarray],
  threads: int,
  progress: bool,
) -> np.ndarray:
  """Decodes a source into the array that `allocate(shape)` gives."""
  if not len(source):
    return allocate((0, 0, 0, 3))
  first = source[0]['image']
  images = allocate((len(source), *first.shape))

  def load(start: int) -> int:
    stop = min(start + _CHUNK, len(source))
    for i in range(start, stop):
      image = source[i]['image']
      if image.shape != first.shape:
        raise InputError(
          f'{source.ids[i]} is {image.shape}, other images are {first.shape}: '
          'pictures of several sizes cannot be cached'
        )
      images[i] = image
    return stop - start

  bar = progress_bar(
    len(source), desc='decode', unit='image', disable=not progress
  )
  pool = ThreadPoolExecutor(max(1, threads))
  try:
    for done in pool.map(load, range(0, len(source), _CHUNK)):
      bar.update(done)
  finally:
    pool.shutdown(cancel_futures=True)
    bar.close()
  return images


def _write(source: Source, goal: str, threads: int, progress: bool) -> None:
  """Decodes into a file beside the goal and moves it there when complete."""
  partial = f'{goal}.partial-{os.getpid()}'

  def allocate(shape: tuple[int, ...]) -> np.ndarray:
    images = np.lib.format.open_memmap(partial, 'w+', np.uint8, shape)
    with open(
      partial, 'r+b'
    ) as file:  # A full disk is an error here, no SIGBUS.
      os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return images

  try:
    os.makedirs(os.path.dirname(goal), exist_ok=True)
    images = _decode(source, allocate, threads, progress)
    note = {'shape': list(images.shape), 'sha256': _digest(images)}
    images.flush()  # pyright: ignore[reportAttributeAccessIssue]
    del images
    _replace(partial, goal)
    with open(partial, 'w', encoding='utf-8') as file:
      json.dump(note, file)
    _replace(partial, f'{goal}.json')
  except OSError as error:
    raise InputError(
      f'{os.path.dirname(goal)} cannot keep decoded images '
      f'({error.strerror}): choose another cache_dir'
    ) from error
  finally:
    if os.path.exists(partial):
      os.remove(partial)


def _replace(partial: str, goal: str) -> None:
  with open(partial, 'r+b') as file:
    os.fsync(file.fileno())
  os.replace(partial, goal)


def _reopen(goal: str, number: int) -> np.ndarray | None:
  """The pictures of an earlier run, or None if they are not to be trusted."""
  if not os.path.exists(goal):
    return None
  try:
    with open(f'{goal}.json', encoding='utf-8') as file:
      note = json.load(file)
    images = np.load(goal, mmap_mode='r')
    whole = list(images.shape) == note['shape'] and len(images) == number
    if whole and images.dtype == np.uint8 and _digest(images) == note['sha256']:
      return images
    reason = 'its content has changed'
  except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
    reason = str(error)
  _LOG.warning('%s is not used (%s): decoding anew', goal, reason)
  return None


def _digest(images: np.ndarray) -> str:
  """SHA-256 over the pixels, without a second copy of them."""
  digest = hashlib.sha256()
  for start in range(0, len(images), 1024):
    digest.update(np.ascontiguousarray(images[start : start + 1024]).data)
  return digest.hexdigest()
