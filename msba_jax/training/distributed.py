"""Joins the processes of a run, only where several are configured.

`jax.distributed.initialize()` raises on a single machine without a cluster, so
the environment is looked at first.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax

from msba_jax.data.errors import InputError

_EXPLICIT = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_CLUSTERS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')


def distributed_settings(
  environment: Mapping[str, str],
) -> dict[str, Any] | None:
  """The arguments of `jax.distributed.initialize`, or None for one process.

  Processes are configured by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID together, by a Slurm or Open MPI launcher that started more
  than one task, or by a TPU pod with several workers.

  Args:
    environment: variables of the process.

  Returns:
    Keyword arguments; an empty dict lets JAX detect the cluster.

  Raises:
    InputError: some but not all variables are set, or no number is one.
  """
  given = [name for name in _EXPLICIT if environment.get(name)]
  if given:
    missing = [name for name in _EXPLICIT if name not in given]
    if missing:
      raise InputError(
        f'{given[0]} is set but {missing[0]} is not; set all of '
        f'{", ".join(_EXPLICIT)}, or none'
      )
    count, index = (_number(environment, name) for name in _EXPLICIT[1:])
    if not 0 <= index < count:
      raise InputError(
        f'JAX_PROCESS_ID={index} must be in 0..{count - 1}, below '
        f'JAX_NUM_PROCESSES={count}'
      )
    if count == 1:
      return None
    return {
      'coordinator_address': environment['JAX_COORDINATOR_ADDRESS'],
      'num_processes': count,
      'process_id': index,
    }
  if any(_number(environment, name) > 1 for name in _CLUSTERS):
    return {}
  if ',' in environment.get('TPU_WORKER_HOSTNAMES', ''):
    return {}
  return None


def initialize(environment: Mapping[str, str] | None = None) -> bool:
  """Joins the other processes, if several are configured.

  Call it before anything that starts a device.

  Args:
    environment: variables of the process, `os.environ` by default.

  Returns:
    Whether there are several processes.
  """
  settings = distributed_settings(
    os.environ if environment is None else environment
  )
  if settings is None:
    return False
  jax.distributed.initialize(**settings)
  return True


def _number(environment: Mapping[str, str], name: str) -> int:
  text = environment.get(name) or '0'
  if not text.isdecimal():
    raise InputError(f'{name}={text!r} must be a whole number')
  return int(text)
