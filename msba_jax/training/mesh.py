"""Global batches over the devices of all processes, and back to the host."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from msba_jax.retrieval.devices import batch_sharding


def padded_size(mesh: Mesh, size: int) -> int:
  """The smallest multiple of the devices that holds a batch."""
  return -(-size // mesh.size) * mesh.size


def process_rows(mesh: Mesh, size: int) -> slice:
  """The rows of a global batch that this process loads.

  Args:
    mesh: from `data_mesh`.
    size: images of the global batch, from `padded_size`.

  Returns:
    A slice of the global batch.

  Raises:
    ValueError: the devices cannot share the batch equally, or none is here.
  """
  if size % mesh.size:
    raise ValueError(f'{size=} must be a multiple of {mesh.size} devices')
  here = jax.process_index()
  held = [i for i, d in enumerate(mesh.devices) if d.process_index == here]
  if not held:
    raise ValueError(f'process {here} holds no device of the mesh')
  each = size // mesh.size
  return slice(min(held) * each, (max(held) + 1) * each)


def global_batch(mesh: Mesh, rows: Any, *, size: int) -> Any:
  """Puts this process's rows of a batch on its devices.

  Args:
    mesh: from `data_mesh`.
    rows: a pytree of host arrays, the rows that `process_rows` names.
    size: images of the global batch.

  Returns:
    The pytree of global arrays, sharded over `data`.
  """
  sharding = batch_sharding(mesh)

  def put(array):
    shape = (size, *np.shape(array)[1:])
    return jax.make_array_from_process_local_data(sharding, array, shape)

  return jax.tree.map(put, rows)


def host_copy(tree: Any) -> Any:
  """Copies a replicated pytree to the host as NumPy arrays.

  The copies own their memory: buffers that a later step donates are not read
  through them.
  """
  return jax.tree.map(lambda leaf: np.array(leaf), tree)
