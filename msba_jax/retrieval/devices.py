"""The devices that retrieval computes on: those of this process, in a row.

Attributes:
  DATA_AXIS: the name of the only mesh axis.
  local_mesh: a mesh over the devices of this process.
  spread: puts arrays on a mesh, their first axis split.
  copy_to_all: puts arrays on every device of a mesh.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ['DATA_AXIS', 'copy_to_all', 'local_mesh', 'spread']

DATA_AXIS = 'data'


def local_mesh(devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh with the single axis `data`, whose sharding the compiler chooses.

  Args:
    devices: which devices; None takes all of this process.

  Returns:
    The mesh, with Auto axes.
  """
  chosen = list(jax.local_devices() if devices is None else devices)
  return jax.make_mesh(
    (len(chosen),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=chosen
  )


def spread(arrays: Any, mesh: Mesh) -> Any:
  """Puts a pytree on the mesh, the first axis of every array split over it.

  Args:
    arrays: a pytree; the first axes must be divisible by the mesh's size.
    mesh: as `local_mesh` makes it.

  Returns:
    The same pytree of arrays on the devices.
  """
  return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(DATA_AXIS)))


def copy_to_all(arrays: Any, mesh: Mesh) -> Any:
  """Puts a pytree on the mesh, a copy on every device.

  Args:
    arrays: a pytree of arrays.
    mesh: as `local_mesh` makes it.

  Returns:
    The same pytree of arrays on the devices.
  """
  return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
