"""The mesh over which images are split, and arrays laid out on it.

A batch is sharded over the one axis `data`, and what all images need is held
whole by every device. The axis is Auto, so that in-batch attention may contract
sharded with sharded images: attention is over the global batch. Retrieval
computes on the devices of this process, training on those of all processes.

Attributes:
  DATA_AXIS: the name of the only mesh axis.
  data_mesh: a mesh over devices of all processes.
  local_mesh: a mesh over the devices of this process.
  batch_sharding, replicated: the two shardings.
  spread: puts arrays on a mesh, their first axis split.
  copy_to_all: puts arrays on every device of a mesh.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = [
  'DATA_AXIS',
  'batch_sharding',
  'copy_to_all',
  'data_mesh',
  'local_mesh',
  'replicated',
  'spread',
]

DATA_AXIS = 'data'


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh with one axis, `data`, over the given devices or all of them.

  Devices are ordered by process, so that each process holds one contiguous
  stretch of a batch.

  Args:
    devices: all devices of all processes by default.

  Returns:
    The mesh, with an Auto axis.
  """
  devices = jax.devices() if devices is None else devices
  ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
  return Mesh(np.array(ordered), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def local_mesh(devices: Sequence[Any] | None = None) -> Mesh:
  """The same over the given devices or all of this process."""
  return data_mesh(jax.local_devices() if devices is None else devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays whose first axis counts images."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def spread(arrays: Any, mesh: Mesh) -> Any:
  """Puts a pytree on the mesh, the first axis of every array split over it.

  Args:
    arrays: a pytree; the first axes must be divisible by the mesh's size.
    mesh: from `data_mesh` or `local_mesh`.

  Returns:
    The same pytree of arrays on the devices.
  """
  return jax.device_put(arrays, batch_sharding(mesh))


def copy_to_all(arrays: Any, mesh: Mesh) -> Any:
  """Puts a pytree on the mesh, a copy on every device.

  Args:
    arrays: a pytree of arrays.
    mesh: from `data_mesh` or `local_mesh`.

  Returns:
    The same pytree of arrays on the devices.
  """
  return jax.device_put(arrays, replicated(mesh))
