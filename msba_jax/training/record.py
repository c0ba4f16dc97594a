"""The record of a run: JSON lines, TensorBoard, and where it ran.

Each line of `metrics.jsonl` is one JSON object with a `step` and a `phase`. A
run that is resumed at step s drops the lines after s first, so that no step
stands there twice.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from msba_jax.data.atomic import write_atomically

_PACKAGES = (
  'msba_jax',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'numpy',
)


class MetricsLog:
  """Appends to `metrics.jsonl` and to TensorBoard's files.

  Args:
    directory: of the run.
    step: where the run resumes; what was logged after it is dropped.
  """

  def __init__(self, directory: Path, *, step: int = 0):
    path = directory / 'metrics.jsonl'
    _truncate(path, step=step)
    self._file = path.open('a', encoding='utf-8')
    self._board = _tensorboard().SummaryWriter(
      str(directory / 'tensorboard'), purge_step=step + 1 if step else None
    )

  def __enter__(self) -> 'MetricsLog':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._file.close()
    self._board.close()

  def write(self, step: int, phase: str, values: Mapping[str, float]) -> None:
    """Adds one line.

    Args:
      step: steps done.
      phase: `train` or `validation`.
      values: by name.
    """
    line = {'step': step, 'phase': phase, **values}
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(f'{phase}/{name}', value, step)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
  """The lines of a run's `metrics.jsonl`.

  Args:
    directory: of the run.

  Returns:
    One dict per line; a last line that was cut off is left out.
  """
  path = directory / 'metrics.jsonl'
  if not path.exists():
    return []
  rows = []
  for line in path.read_text(encoding='utf-8').splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:
      break
  return rows


def environment() -> dict[str, Any]:
  """What a result depends on beside its experiment.

  Returns:
    Versions, the commit of the checkout if there is one, and the devices.
  """
  devices = jax.devices()
  return {
    'python': platform.python_version(),
    'versions': {name: metadata.version(name) for name in _PACKAGES},
    'commit': commit(),
    'platform': platform.platform(),
    'cpu_count': os.cpu_count(),
    'devices': [devices[0].device_kind, len(devices)],
    'processes': jax.process_count(),
    'command': sys.argv,
  }


def commit() -> str | None:
  """The commit of the checkout, `+` behind it if files differ from it."""
  here = Path(__file__).resolve().parents[2]
  if not (here / '.git').exists():
    return None
  git = ['git', '-C', str(here)]
  try:
    head = subprocess.run(
      [*git, 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True
    ).stdout.strip()
    changed = subprocess.run(
      [*git, 'status', '--porcelain'],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None
  return head + ('+' if changed else '')


def _tensorboard() -> Any:
  """tensorboardX, which would import torch wherever it is installed."""
  hidden = 'torch' not in sys.modules
  if hidden:
    sys.modules['torch'] = None  # pyright: ignore[reportArgumentType]
  try:
    import tensorboardX
  finally:
    if hidden:
      del sys.modules['torch']
  return tensorboardX


def _truncate(path: Path, *, step: int) -> None:
  """Drops the lines after a step, in one atomic write."""
  if not path.exists():
    return
  kept = [row for row in read_metrics(path.parent) if row['step'] <= step]
  text = ''.join(json.dumps(row) + '\n' for row in kept)
  write_atomically(path, text.encode())
