"""One hash for everything that decides the numbers of a run.

The hash is taken over a canonical description of the experiment: the same in
every process, whatever the addresses of its functions.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import numpy as np

from msba_jax.training.experiment import Experiment
from msba_jax.training.load import FILE_MODULE

# Fields that say how a run is watched, not what it computes.
_WATCHING = ('log_every', 'checkpoint_every', 'evaluate_every', 'origin')


def configuration_hash(experiment: Experiment) -> str:
  """The hash of an experiment.

  Two experiments with one hash train to the same parameters on the same
  machine. How often they log, save and evaluate does not enter.

  Args:
    experiment: what is described.

  Returns:
    64 hexadecimal digits.
  """
  fields = {
    field.name: describe(getattr(experiment, field.name))
    for field in dataclasses.fields(experiment)
    if field.name not in _WATCHING
  }
  text = json.dumps(fields, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def describe(value: Any) -> Any:
  """A description of a value in JSON's types, free of memory addresses.

  Args:
    value: a dataclass (Flax modules are), a container, a function, an array or
      a plain value.

  Returns:
    Nested lists, dicts and plain values.

  Raises:
    TypeError: the value has no description that is the same in every process.
  """
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, type):
    return _name(value)
  if isinstance(value, functools.partial):
    inner = [value.func, value.args, value.keywords]
    return ['partial', *(describe(part) for part in inner)]
  if isinstance(value, FunctionType):
    return _function(value)
  if isinstance(value, Mapping):
    return {str(key): describe(part) for key, part in value.items()}
  if isinstance(value, (tuple, list)):
    return [_name(type(value)), *(describe(part) for part in value)]
  if isinstance(value, (set, frozenset)):
    return ['set', *sorted(json.dumps(describe(part)) for part in value)]
  if isinstance(value, np.dtype):
    return str(value)
  if hasattr(value, '__array__'):
    array = np.asarray(value)
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return ['array', str(array.dtype), list(array.shape), digest]
  return _object(value)


def _object(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    names = [field.name for field in dataclasses.fields(value) if field.init]
    names = [name for name in names if name != 'parent']
    parts = {name: describe(getattr(value, name)) for name in names}
    return [_name(type(value)), parts]
  if hasattr(value, '__func__'):  # a bound method
    return ['method', describe(value.__self__), describe(value.__func__)]
  wrapped = getattr(value, '__wrapped__', None)
  if wrapped is not None:  # jax.jit, jax.custom_vjp …
    return [_name(type(value)), describe(wrapped)]
  if isinstance(getattr(value, '__name__', None), str):  # a built-in, a ufunc
    return _name(value)
  text = repr(value)
  if ' at 0x' in text:
    raise TypeError(
      f'{text} cannot be part of an experiment: it has no description that '
      'is the same in every process; make it a dataclass or a function'
    )
  return [_name(type(value)), text]


def _function(function: FunctionType) -> Any:
  """Name, source where the name says nothing, and what it closes over."""
  if function.__globals__.get('__name__', '').startswith('jaxtyping.'):
    return describe(inspect.unwrap(function))  # checks its types, no more
  name = _name(function)
  source = ''
  if '<' in name:  # a lambda or a local function
    source = textwrap.dedent(inspect.getsource(function))
  cells = [cell.cell_contents for cell in function.__closure__ or ()]
  cells = [cell for cell in cells if cell is not function]
  defaults = [function.__defaults__, function.__kwdefaults__]
  return [name, source, describe(cells), describe(defaults)]


def _name(value: Any) -> str:
  module = getattr(value, '__module__', None) or ''
  if module.startswith(FILE_MODULE):  # the file may have been copied
    module = 'experiment'
  return f'{module}.{getattr(value, "__qualname__", value.__name__)}'
