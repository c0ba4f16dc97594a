import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msba_jax.data.errors import InputError
from msba_jax.training.checkpoint import Checkpoints, flatten, unflatten


def _tree(seed):
  """A pytree as training has it: nested, several dtypes, an empty leaf."""
  rng = np.random.default_rng(seed)
  params = {'a': {'kernel': rng.normal(size=(3, 4)).astype(np.float32)}}
  tree = {
    'step': np.int32(seed),
    'params': params,
    'opt_state': optax.adamw(1e-3).init(params),
    'half': rng.normal(size=5).astype(jnp.bfloat16),
    'valid': rng.random(5) > 0.5,
    'nothing': np.zeros((0, 3), np.float32),
  }
  return jax.tree.map(np.asarray, tree)


def _assert_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == b.dtype
    assert isinstance(a, np.ndarray)
    np.testing.assert_array_equal(a, b)


def _files(directory):
  paths = sorted(p for p in directory.rglob('*') if p.is_file())
  return [p for p in paths if p.name != 'manifest.json']


def test_flatten_and_back():
  tree = _tree(1)
  leaves = flatten(tree)
  assert 'params.a.kernel' in leaves
  _assert_equal(unflatten(leaves, tree), tree)


def test_what_is_saved_is_restored_exactly(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest is None
    checkpoints.save(3, _tree(3))
    assert checkpoints.latest == 3
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest == 3
    _assert_equal(checkpoints.restore(_tree(0)), _tree(3))
    shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _tree(0)
    )
    _assert_equal(checkpoints.restore(shapes), _tree(3))


def test_the_last_ones_and_the_best_are_kept(tmp_path):
  scores = {1: 0.5, 2: 0.9, 3: None, 4: 0.1, 5: None, 6: 0.2}
  with Checkpoints(tmp_path, keep=2, keep_best=True) as checkpoints:
    for step, score in scores.items():
      checkpoints.save(step, _tree(step), score=score)
    assert checkpoints.steps == [2, 5, 6]
    assert checkpoints.best() == 2
    _assert_equal(checkpoints.restore(_tree(0), step=2), _tree(2))
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.best() == 2


def test_a_flipped_bit_is_noticed_in_every_file(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _tree(1))
    checkpoints.save(2, _tree(2))
  number = len(_files(tmp_path / '2'))
  assert number > 2
  for i in range(number):
    with Checkpoints(tmp_path) as checkpoints:
      assert checkpoints.latest == 2
    path = _files(tmp_path / '2')[i]
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 1] = bytes(
      [content[len(content) // 2] ^ 1] if content else [1]
    )
    whole = path.read_bytes()
    path.write_bytes(bytes(content))
    with (
      pytest.warns(UserWarning, match='skipping checkpoint 2: .*not what was'),
      Checkpoints(tmp_path) as checkpoints,
    ):
      assert checkpoints.latest == 1
    (aside,) = tmp_path.glob('broken-2-*')
    (aside / path.relative_to(tmp_path / '2')).write_bytes(whole)
    os.rename(aside, tmp_path / '2')


@pytest.mark.parametrize('damage', ['empty', 'uncommitted', 'missing'])
def test_an_unusable_step_gives_way_to_the_one_before(tmp_path, damage):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _tree(1))
    checkpoints.save(2, _tree(2))
  step = tmp_path / '2'
  if damage == 'empty':
    for path in _files(step):
      path.write_bytes(b'')
  elif damage == 'uncommitted':
    (step / 'manifest.json').unlink()
  else:
    _files(step)[0].unlink()
  with pytest.warns(UserWarning, match='skipping checkpoint 2'):
    checkpoints = Checkpoints(tmp_path)
  with checkpoints:
    assert checkpoints.latest == 1
    _assert_equal(checkpoints.restore(_tree(0)), _tree(1))
    checkpoints.save(2, _tree(7))  # the run comes by again
    assert checkpoints.latest == 2
  with Checkpoints(tmp_path) as checkpoints:
    _assert_equal(checkpoints.restore(_tree(0)), _tree(7))


def test_no_good_step_is_none(tmp_path):
  (tmp_path / '4').mkdir()
  with pytest.warns(UserWarning, match='4 was not finished'):
    checkpoints = Checkpoints(tmp_path)
  with checkpoints:
    assert checkpoints.latest is None
    with pytest.raises(InputError, match='has no checkpoint'):
      checkpoints.restore(_tree(0))


def test_a_killed_save_leaves_nothing_behind(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _tree(1))
  (tmp_path / '2.orbax-checkpoint-tmp-0').mkdir()
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest == 1
  assert [p.name for p in tmp_path.iterdir()] == ['1']


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (lambda t: {**t, 'half': np.zeros(5, np.float32)}, 'half as .*bfloat16'),
    (lambda t: {**t, 'half': np.zeros(6, jnp.bfloat16)}, 'half as .*5'),
    (lambda t: {**t, 'more': np.zeros(2)}, 'more as nothing'),
    (lambda t: {k: t[k] for k in t if k != 'valid'}, 'valid'),
    (lambda t: {**t, 'nothing': np.zeros((0, 4), np.float32)}, 'nothing as'),
  ],
)
def test_other_shapes_and_dtypes_are_refused(tmp_path, change, said):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _tree(1))
    with pytest.raises(InputError, match=said):
      checkpoints.restore(change(_tree(0)))


def test_a_manifest_that_lies_about_its_arrays(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _tree(1))
    path = tmp_path / '1' / 'manifest.json'
    manifest = json.loads(path.read_text())
    manifest['leaves']['half'][1] = 'float32'
    path.write_text(json.dumps(manifest))
    target = {**_tree(0), 'half': np.zeros(5, np.float32)}
    with pytest.raises(
      InputError, match=re.escape("half as [[5], 'bfloat16']")
    ):
      checkpoints.restore(target)
