import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.data.errors import InputError
from msba_jax.training.weights import load_weights, save_weights


def _tree(rng):
  return {
    'params': {
      'a': {'kernel': rng.normal(size=(3, 2)).astype(np.float32)},
      'half': rng.normal(size=4).astype(jnp.bfloat16),
      'scalar': np.float32(2.0),
    },
    'memory': {'valid': np.array([True, False])},
  }


def test_weights_come_back_exactly(tmp_path, rng):
  tree = _tree(rng)
  save_weights(tmp_path / 'weights', tree, step=3)
  found = load_weights(tmp_path / 'weights')
  for path in (('params', 'a', 'kernel'), ('params', 'half')):
    a, b = found, tree
    for key in path:
      a, b = a[key], b[key]
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  assert found['params']['scalar'].shape == ()
  np.testing.assert_array_equal(found['memory']['valid'], [True, False])


def test_weights_are_replaced(tmp_path, rng):
  save_weights(tmp_path / 'weights', _tree(rng), step=3)
  save_weights(tmp_path / 'weights', {'a': np.ones(2)}, step=4)
  assert list(load_weights(tmp_path / 'weights')) == ['a']
  assert [p.name for p in tmp_path.iterdir()] == ['weights']


def test_a_changed_file_is_refused(tmp_path, rng):
  save_weights(tmp_path / 'weights', _tree(rng), step=3)
  path = tmp_path / 'weights' / 'arrays.npz'
  content = bytearray(path.read_bytes())
  content[200] ^= 1
  path.write_bytes(bytes(content))
  with pytest.raises(InputError, match=r'arrays\.npz is not what was written'):
    load_weights(tmp_path / 'weights')


def test_no_weights_are_refused(tmp_path):
  with pytest.raises(InputError, match='was not finished'):
    load_weights(tmp_path / 'weights')
