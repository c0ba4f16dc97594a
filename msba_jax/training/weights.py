"""What remains of a training: parameters and memory in a `.npz` of arrays.

The directory `weights/` holds `arrays.npz`, one array per leaf named by its
path, and a manifest with hashes, shapes and dtypes. No pickle is read.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from msba_jax.data.directory import (
  BrokenError,
  atomic_directory,
  read_manifest,
  write_manifest,
)
from msba_jax.data.errors import InputError
from msba_jax.training.checkpoint import (
  compare_specifications,
  flatten,
  specification,
)

_FILE = 'arrays.npz'


def save_weights(directory: Path, tree: Any, *, step: int) -> None:
  """Writes arrays; what stood in the directory is replaced in one step.

  Args:
    directory: the goal.
    tree: nested dicts of host arrays.
    step: how long they were trained.
  """
  leaves = flatten(tree)
  with atomic_directory(directory) as partial:
    # NumPy has no names for bfloat16 and its like: the manifest does.
    raw = {
      name: leaf.view(np.uint16) if leaf.dtype.kind == 'V' else leaf
      for name, leaf in leaves.items()
    }
    np.savez(partial / _FILE, **raw)
    facts = {'step': step, 'leaves': specification(leaves)}
    write_manifest(partial, facts)


def load_weights(directory: Path) -> dict[str, Any]:
  """Reads what `save_weights` wrote.

  Args:
    directory: with a manifest.

  Returns:
    Nested dicts of host arrays.

  Raises:
    InputError: a file is missing, or is not what was written.
  """
  try:
    facts = read_manifest(directory)
  except BrokenError as error:
    raise InputError(
      f'weights are broken: {error}; run `msba train` again'
    ) from error
  expected = facts['leaves']
  with np.load(directory / _FILE, allow_pickle=False) as file:
    leaves = {
      name: _typed(file[name], dtype) for name, (_, dtype) in expected.items()
    }
  compare_specifications(specification(leaves), expected, where=directory)
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *path, last = name.split('.')
    node = tree
    for part in path:
      node = node.setdefault(part, {})
    node[last] = leaf
  return tree


def _typed(array: np.ndarray, dtype: str) -> np.ndarray:
  goal = jnp.dtype(dtype)
  return array.view(goal) if goal.kind == 'V' else array
