"""Tensors of a published checkpoint to the parameters of our modules.

Attributes:
  WeightsError: a checkpoint does not hold what a module needs.
  convert_tensors: applies a table of names and checks both sides.
  stack_blocks: parameters of single blocks as those of a scanned stack.
  unstack_blocks: the inverse.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from msba_jax.models.weight_names import Tensor

__all__ = [
  'WeightsError',
  'convert_tensors',
  'stack_blocks',
  'unstack_blocks',
]

Tree = dict[str, Any]


class WeightsError(ValueError):
  """A checkpoint does not hold what a module needs; the message names it."""


def convert_tensors(
  tensors: Mapping[str, np.ndarray], table: Iterable[Tensor], expected: Any
) -> tuple[Tree, set[str]]:
  """The variables of a module from the tensors of a checkpoint.

  Args:
    tensors: by name, as PyTorch lays them out.
    table: how each of our parameters is made.
    expected: the variables of the module, or their shapes as `jax.eval_shape`
      gives them.

  Returns:
    The variables as nested dicts of float32 arrays, and the names of the
    tensors that were used.

  Raises:
    WeightsError: a tensor is missing, holds no finite floating-point numbers,
      or does not have the shape that the module needs.
    ValueError: the table names a parameter twice, one that the module does not
      have, or leaves one out.
  """
  goal = {
    tuple(str(getattr(key, 'key', key)) for key in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected)
  }
  variables: Tree = {}
  used: set[str] = set()
  for entry in table:
    if entry.path not in goal:
      raise ValueError(f'no parameter of the module, or twice: {entry.path}')
    array = _made(tensors, entry, goal.pop(entry.path))
    used.update(entry.sources)
    *nodes, last = entry.path
    node = variables
    for name in nodes:
      node = node.setdefault(name, {})
    node[last] = array
  if goal:
    raise ValueError(f'the table makes nothing of {sorted(goal)}')
  return variables, used


def _made(
  tensors: Mapping[str, np.ndarray], entry: Tensor, shape: tuple[int, ...]
) -> np.ndarray:
  """One parameter."""
  sources = []
  for name in entry.sources:
    if name not in tensors:
      raise WeightsError(f'the tensor {name} is missing')
    array = np.asarray(tensors[name])
    # bfloat16 and its like are kind V to NumPy.
    if array.dtype.kind not in 'fV':
      raise WeightsError(f'{name} holds {array.dtype}, not floating point')
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
      raise WeightsError(f'{name} holds numbers that are not finite')
    sources.append(array)
  shapes = ', '.join(
    f'{name} {array.shape}'
    for name, array in zip(entry.sources, sources, strict=True)
  )
  ours = '/'.join(entry.path)
  try:
    made = np.asarray(entry.convert(*sources), np.float32)
  except (ValueError, IndexError) as error:
    raise WeightsError(
      f'{shapes} cannot become {ours} {shape}: {error}'
    ) from error
  if made.shape != shape:
    raise WeightsError(f'{shapes} gives {made.shape}; {ours} must be {shape}')
  return np.ascontiguousarray(made)


def stack_blocks(params: Mapping[str, Any]) -> Tree:
  """Parameters of `block_0`, `block_1`, … as those of a scanned stack.

  Args:
    params: of a module made with `scan=False`.

  Returns:
    Those of the same module with `scan=True`.

  Example:
    >>> stacked = stack_blocks({'block_0': {'b': 1.0}, 'block_1': {'b': 2.0}})
    >>> stacked['blocks']['b'].tolist()
    [1.0, 2.0]
  """
  blocks = {name: x for name, x in params.items() if _is_block(name)}
  ordered = sorted(blocks, key=lambda name: int(name.removeprefix('block_')))
  stacked = jax.tree.map(
    lambda *leaves: np.stack([np.asarray(x) for x in leaves]),
    *(blocks[name] for name in ordered),
  )
  rest = {name: x for name, x in params.items() if name not in blocks}
  return rest | {'blocks': stacked}


def unstack_blocks(params: Mapping[str, Any]) -> Tree:
  """The inverse of `stack_blocks`.

  Args:
    params: of a module made with `scan=True`.

  Returns:
    Those of the same module with `scan=False`.

  Example:
    >>> unstack_blocks({'blocks': {'b': np.array([1.0, 2.0])}})['block_1']
    {'b': np.float64(2.0)}
  """
  stacked = params['blocks']
  depth = len(jax.tree.leaves(stacked)[0])
  rest = {name: x for name, x in params.items() if name != 'blocks'}
  return rest | {
    f'block_{i}': jax.tree.map(lambda x, i=i: x[i], stacked)
    for i in range(depth)
  }


def _is_block(name: str) -> bool:
  return re.fullmatch(r'block_\d+', name) is not None
