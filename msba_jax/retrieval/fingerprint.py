"""What a model is, in 64 hexadecimal digits.

An index is useless with another model than the one that made it, and nothing
in its numbers shows that. The fingerprint covers the parameters and the
structure of the model: class names and fields, functions by their names,
bound arguments and closures. Addresses in memory never enter, so that two
processes agree.

Attributes:
  model_fingerprint: SHA-256 over a model, its parameters and further facts.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

__all__ = ['model_fingerprint']


def model_fingerprint(model: nn.Module, params: Any, *facts: Any) -> str:
  """SHA-256 over the structure of a model and the values of its parameters.

  Args:
    model: the module; functions injected into it count by name.
    params: its parameters, a pytree of arrays.
    *facts: whatever else decides the result, such as the normalisation.

  Returns:
    64 hexadecimal digits.
  """
  digest = hashlib.sha256()
  for line in (_describe(model, ()), _describe(facts, ())):
    digest.update(line.encode() + b'\n')
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  for path, leaf in leaves:
    array = np.asarray(leaf)
    name = jax.tree_util.keystr(path)
    digest.update(f'{name} {array.dtype} {array.shape}\n'.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def _describe(value: Any, above: tuple[int, ...]) -> str:
  """Text that is equal for equal values in every process.

  Args:
    value: anything that is found in the fields of a module.
    above: identities of the values it lies in; a cycle ends there.

  Returns:
    One line.
  """
  if id(value) in above:
    return '…'
  below = functools.partial(_describe, above=(*above, id(value)))
  if isinstance(value, Mapping):
    items = sorted((str(key), below(item)) for key, item in value.items())
    return '{' + ', '.join(f'{key}: {item}' for key, item in items) + '}'
  if isinstance(value, (tuple, list)):
    return '(' + ', '.join(below(item) for item in value) + ')'
  if isinstance(value, (np.ndarray, jax.Array)):
    array = np.ascontiguousarray(value)
    content = hashlib.sha256(array.tobytes()).hexdigest()
    return f'array {array.dtype} {array.shape} {content}'
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {
      field.name: getattr(value, field.name)
      for field in dataclasses.fields(value)
      if field.name not in ('parent', 'name')
    }
    return f'{type(value).__qualname__}{below(fields)}'
  if isinstance(value, functools.partial):
    bound = (value.func, value.args, value.keywords)
    return f'partial{below(bound)}'
  if callable(value):
    return _describe_callable(value, below)
  return repr(value)


def _describe_callable(value: Any, below: Any) -> str:
  name = getattr(value, '__qualname__', None)
  if name is None:
    name = getattr(value, '__name__', type(value).__qualname__)
  inner = getattr(value, '__wrapped__', value)
  cells = getattr(inner, '__closure__', None) or ()
  captured = [cell.cell_contents for cell in cells if not _is_empty(cell)]
  owner = getattr(value, '__self__', None)
  if dataclasses.is_dataclass(owner):
    captured.append(owner)
  return f'{name}{below(captured)}' if captured else str(name)


def _is_empty(cell: Any) -> bool:
  try:
    _ = cell.cell_contents
  except ValueError:
    return True
  return False
