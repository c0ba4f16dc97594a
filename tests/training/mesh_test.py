import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from msba_jax.retrieval.devices import batch_sharding, data_mesh, replicated
from msba_jax.training.mesh import (
  global_batch,
  host_copy,
  padded_size,
  process_rows,
)


@pytest.mark.parametrize('count', [1, 2, 3, 8])
def test_a_batch_is_laid_out_over_the_devices(count, rng):
  mesh = data_mesh(jax.devices()[:count])
  assert mesh.axis_names == ('data',)
  assert mesh.axis_types == (AxisType.Auto,)
  size = padded_size(mesh, 10)
  assert size % count == 0
  assert 10 <= size < 10 + count
  rows = {
    'image': (rng.normal(size=(size, 2, 2)), rng.normal(size=(size, 3))),
    'label': np.arange(size),
  }
  held = process_rows(mesh, size)
  assert held == slice(0, size)
  batch = global_batch(mesh, rows, size=size)
  for leaf, array in zip(
    jax.tree.leaves(batch), jax.tree.leaves(rows), strict=True
  ):
    assert leaf.sharding == batch_sharding(mesh)
    assert leaf.addressable_shards[0].data.shape[0] == size // count
    np.testing.assert_allclose(leaf, array, rtol=1e-6)


def test_all_devices_are_taken_by_default():
  assert data_mesh().size == jax.device_count()


def test_rows_must_be_shared_equally():
  with pytest.raises(ValueError, match='size=9 must be a multiple of 8'):
    process_rows(data_mesh(), 9)


def test_a_host_copy_owns_its_memory():
  mesh = data_mesh()
  tree = jax.device_put({'a': np.arange(4.0)}, replicated(mesh))
  copy = host_copy(tree)
  assert isinstance(copy['a'], np.ndarray)
  assert copy['a'].flags.owndata
  tree['a'].delete()
  np.testing.assert_array_equal(copy['a'], np.arange(4.0))
