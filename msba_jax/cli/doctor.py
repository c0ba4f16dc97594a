"""Says what this machine offers, and what would keep msba from working.

Every line begins with `ok`, `note` (works, but worth knowing) or `FAIL`; the
exit code is 1 if anything fails.

Attributes:
  Options: the flags of `msba doctor`.
  Finding: one line of the answer.
  run: checks, prints, returns the exit code.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

EXAMPLES = """\
  msba doctor
  msba doctor photos/ cub.zip       also reads these data sets
  JAX_PLATFORMS=cpu msba doctor     as if there were no accelerator
"""
INTERRUPTED = 'Nothing was changed.'

_GIB = 2**30
_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'tensorflow-datasets',
  'array-record',
  'numpy',
  'pillow',
)
_ROOMS = ('layers', 'losses', 'metrics', 'models', 'data', 'retrieval')


@dataclass(frozen=True)
class Options:
  """Flags of `msba doctor`."""

  data: tyro.conf.Positional[tuple[Path, ...]] = ()
  """Folders or zips of images (split/class/file) to look into."""
  directory: Path = Path()
  """Where runs and results are to be written."""
  disk: float = 2.0
  """Free disk space wanted there, GiB."""
  memory: float = 2.0
  """Free memory wanted, GiB."""


class Finding(NamedTuple):
  """One line of the answer.

  Attributes:
    state: fine, worth knowing, or an obstacle.
    subject: what was looked at.
    text: what was found.
  """

  state: Literal['ok', 'note', 'FAIL']
  subject: str
  text: str


def run(options: Options) -> int:
  """Prints one line a check; 1 if any of them failed."""
  failed = 0
  for check in (_versions, _devices, _frameworks, _memory, _disk, _data):
    for finding in check(options):
      failed += finding.state == 'FAIL'
      print(f'{finding.state:<5} {finding.subject:<10} {finding.text}')
  print(
    f'{failed} of the checks failed.' if failed else 'Nothing is in the way.'
  )
  return int(failed > 0)


def _versions(options: Options) -> Iterator[Finding]:
  """Of Python, of this package and of what it stands on."""
  del options
  yield Finding(
    'ok' if sys.version_info >= (3, 11) else 'FAIL',
    'python',
    f'{platform.python_version()} on {platform.platform(terse=True)}, '
    f'{os.cpu_count()} cores',
  )
  from msba_jax import __version__

  yield Finding('ok', 'msba_jax', __version__)
  for package in _PACKAGES:
    try:
      version = importlib.metadata.version(package)
      yield Finding('ok', package, version)
    except importlib.metadata.PackageNotFoundError:
      yield Finding('FAIL', package, f'missing: pip install {package}')


def _devices(options: Options) -> Iterator[Finding]:
  """What JAX computes on, tried with one product."""
  del options
  import jax
  import jax.numpy as jnp

  try:
    devices = jax.devices()
    total = float(jnp.ones((64, 64)).dot(jnp.ones((64, 64))).sum())
  except RuntimeError as error:
    yield Finding('FAIL', 'devices', f'JAX starts none: {error}')
    return
  kinds = sorted({f'{d.platform} ({d.device_kind})' for d in devices})
  right = total == 64**3
  yield Finding(
    'ok' if right else 'FAIL',
    'devices',
    f'{len(devices)} × {", ".join(kinds)}'
    + ('' if right else f'; a product of ones gave {total}, not {64**3}'),
  )
  if jax.default_backend() == 'cpu' and shutil.which('nvidia-smi'):
    yield Finding(
      'note', 'devices', "a GPU is left idle: pip install 'msba_jax[cuda]'"
    )


def _frameworks(options: Options) -> Iterator[Finding]:
  """That importing the package brings no TensorFlow and no torch along."""
  del options
  for room in _ROOMS:
    importlib.import_module(f'msba_jax.{room}')
  loaded = [name for name in ('tensorflow', 'torch') if name in sys.modules]
  if loaded:
    yield Finding('FAIL', 'frameworks', f'{" and ".join(loaded)} was imported')
  else:
    yield Finding('ok', 'frameworks', 'neither TensorFlow nor torch is loaded')


def _memory(options: Options) -> Iterator[Finding]:
  """What this process may still take."""
  free = _free_memory()
  if free is None:
    yield Finding('note', 'memory', 'this system does not say')
    return
  enough = free >= options.memory * _GIB
  yield Finding(
    'ok' if enough else 'FAIL',
    'memory',
    f'{free / _GIB:.1f} GiB free'
    + ('' if enough else f', wanted {options.memory:g}'),
  )


def _free_memory() -> int | None:
  """Available bytes, bounded by the limit of a container; None: unknown."""
  try:
    lines = Path('/proc/meminfo').read_text().splitlines()
    fields = dict(line.split(':') for line in lines)
    free = int(fields['MemAvailable'].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    return None
  group = Path('/sys/fs/cgroup')
  try:
    limit = int((group / 'memory.max').read_text())
    used = int((group / 'memory.current').read_text())
  except (OSError, ValueError):
    return free
  return min(free, limit - used)


def _disk(options: Options) -> Iterator[Finding]:
  """Room and the right to write where runs go."""
  directory = options.directory.resolve()
  while not directory.exists():
    directory = directory.parent
  free = shutil.disk_usage(directory).free
  enough = free >= options.disk * _GIB
  yield Finding(
    'ok' if enough else 'FAIL',
    'disk',
    f'{free / _GIB:.1f} GiB free in {directory}'
    + ('' if enough else f', wanted {options.disk:g}'),
  )
  if not os.access(directory, os.W_OK):
    yield Finding('FAIL', 'disk', f'{directory} cannot be written to')


def _data(options: Options) -> Iterator[Finding]:
  """Every data set that was named: the splits that training would see."""
  from msba_jax.data.errors import InputError
  from msba_jax.data.folder import FolderData

  for path in options.data:
    try:
      splits = FolderData(str(path)).open()
      parts = {
        'train': splits.train,
        'validation': splits.validation.queries,
        'test': splits.test.queries,
      }
      if splits.test.gallery is not None:
        parts['gallery'] = splits.test.gallery
      sizes = ', '.join(
        f'{name} {len(part):,} images of {len(part.class_names):,} classes'
        for name, part in parts.items()
      )
      _ = splits.train[0]  # the first image can be decoded
      yield Finding('ok', 'data', f'{path}: {sizes}')
    except InputError as error:
      yield Finding('FAIL', 'data', str(error))
