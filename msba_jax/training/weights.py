"""What remains of a training: parameters and memory in a `.npz` of arrays.

The directory `weights/` holds `arrays.npz`, one array per leaf named by its
path, and a manifest with hashes, shapes and dtypes. No pickle is read.
"""

from collections.abc import Mapping
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


def save_weights(
  directory: Path,
  tree: Any,
  *,
  step: int,
  facts: Mapping[str, Any] | None = None,
) -> None:
  """Writes arrays; what stood in the directory is replaced in one step.

  Args:
    directory: the goal.
    tree: nested dicts of host arrays.
    step: how long they were trained.
    facts: what else the manifest says.
  """
  leaves = flatten(tree)
  with atomic_directory(directory) as partial:
    # NumPy has no names for bfloat16 and its like: the manifest does.
    raw = {
      name: leaf.view(np.uint16) if leaf.dtype.kind == 'V' else leaf
      for name, leaf in leaves.items()
    }
    np.savez(partial / _FILE, **raw)
    known = {'step': step, 'leaves': specification(leaves)}
    write_manifest(partial, {**(facts or {}), **known})


def load_weights(directory: Path) -> dict[str, Any]:
  """The arrays alone that `read_weights` gives."""
  return read_weights(directory, again='run `msba train` again')[0]


def read_weights(
  directory: Path, *, again: str
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads what `save_weights` wrote.

  Args:
    directory: with a manifest.
    again: what the user can do if the directory is broken.

  Returns:
    Nested dicts of host arrays, and the manifest.

  Raises:
    InputError: a file is missing, or is not what was written.
  """
  try:
    facts = read_manifest(directory)
    expected = facts['leaves']
  except (BrokenError, KeyError) as error:
    raise InputError(f'weights are broken: {error}; {again}') from error
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
  return tree, facts


def _typed(array: np.ndarray, dtype: str) -> np.ndarray:
  goal = jnp.dtype(dtype)
  return array.view(goal) if goal.kind == 'V' else array
