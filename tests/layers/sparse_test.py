"""Tests of `msba_jax.layers.sparse`."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from msba_jax.layers import (
  attention,
  block_plan,
  block_sparse,
  blocks,
  sparse,
)


def draw(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def arrays(rng, n, m, h=2, d=4, f=3, lead=()):
  """Queries, keys and values."""
  return (
    draw(rng, *lead, n, h, d),
    draw(rng, *lead, m, h, d),
    draw(rng, *lead, m, h, f),
  )


def token_mask(indices, block, n, m):
  """The choice as a mask of tokens, in NumPy."""
  rows, columns = block
  indices = np.asarray(indices)
  mask = np.zeros((*indices.shape[:-1], -(-m // columns)), bool)
  for place in np.ndindex(indices.shape):
    if 0 <= indices[place] < mask.shape[-1]:
      mask[(*place[:-1], indices[place])] = True
  mask = np.repeat(np.repeat(mask, rows, axis=-2), columns, axis=-1)
  return jnp.asarray(mask[..., :n, :m])


def both(given, indices, block, weights=None):
  """Value and gradients of the sparse form and of the dense reference."""
  n, m = given[0].shape[-3], given[1].shape[-3]
  mask = token_mask(indices, block, n, m)

  def ours(*given):
    messages = sparse.attend_blocks(*given, indices, block=block)
    return jnp.sum(messages * weights), messages

  def theirs(*given):
    messages = attention.attend(*given, mask=mask, implementation='dense')
    return jnp.sum(messages * weights), messages

  if weights is None:
    shape = (*given[0].shape[:-1], given[2].shape[-1])
    weights = draw(np.random.default_rng(1), *shape)
  # Without gradients there may be kernels in place of steps.
  return [
    (
      jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True))(*given),
      jax.jit(function)(*given),
    )
    for function in (ours, theirs)
  ]


@pytest.mark.usefixtures('steps')
@hypothesis.given(
  n=st.sampled_from([1, 6, 11]), m=st.sampled_from([1, 9, 13]),
  block=st.sampled_from([(2, 3), (4, 2), (1, 1), (16, 16)]),
  keep=st.integers(1, 5), lead=st.sampled_from([(), (2,), (2, 2)]),
  seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_dense_attention_with_the_mask(n, m, block, keep, lead, seed):
  rng = np.random.default_rng(seed)
  given = arrays(rng, n, m, lead=lead)
  count = -(-m // block[1])
  shape = (*lead, 2, -(-n // block[0]), keep)
  # From −1 to one past the end, with repetitions.
  indices = jnp.asarray(rng.integers(-1, count + 1, shape), jnp.int32)
  ours, theirs = both(given, indices, block)
  chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('shape', [(3, 2), (1, 3, 2), (2, 3, 2), (2, 1, 3, 2)])
def test_choices_are_shared_by_heads_and_leading_axes(rng, shape):
  given = arrays(rng, 6, 8, lead=(2,))
  indices = jnp.asarray(rng.integers(0, 4, shape), jnp.int32)
  ours, theirs = both(given, indices, (2, 2))
  chex.assert_trees_all_close(ours, theirs, atol=2e-5)


@pytest.mark.parametrize('keep', [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize('most', [1, 2, 3, 4])
def test_steps_that_do_not_divide_the_choices(monkeypatch, rng, keep, most):
  monkeypatch.setattr(block_plan, 'STEP', (2, 2 * most))
  given = arrays(rng, 6, 14)
  indices = np.stack([rng.permutation(7)[:keep] for _ in range(3)])
  ours, theirs = both(given, jnp.asarray(indices), (2, 2))
  chex.assert_trees_all_close(ours, theirs, atol=2e-5)


def test_rows_of_unequal_length(variant, rng):
  given = arrays(rng, 12, 12)
  indices = np.full((6, 6), -1, np.int32)
  for row, length in enumerate([0, 6, 1, 3, 2, 5]):
    indices[row, :length] = rng.permutation(6)[:length]
  messages = variant(functools.partial(sparse.attend_blocks, block=2))(
    *given, jnp.asarray(indices)
  )
  mask = token_mask(indices, (2, 2), 12, 12)
  expected = attention.attend(*given, mask=mask)
  np.testing.assert_allclose(messages, expected, atol=2e-6)
  assert np.all(np.asarray(messages[:2]) == 0)


def test_the_order_of_indices_and_repetitions_do_not_matter(rng):
  given = arrays(rng, 6, 8)
  indices = jnp.array([[0, 3], [1, 2], [3, 0]])
  other = jnp.array([[3, 0, 3], [2, 1, 1], [0, 0, 3]])
  attend = functools.partial(sparse.attend_blocks, block=2)
  np.testing.assert_array_equal(
    attend(*given, indices), attend(*given, other)[:6]
  )


def test_permuting_blocks_permutes_the_result(rng):
  queries, keys, values = arrays(rng, 8, 8)
  indices = jnp.asarray(rng.integers(0, 4, (4, 2)), jnp.int32)
  order = np.array([2, 0, 3, 1])
  attend = functools.partial(sparse.attend_blocks, block=2)
  messages = attend(queries, keys, values, indices)

  def shuffle(x):
    return x.reshape(4, 2, *x.shape[1:])[order].reshape(x.shape)

  place = jnp.asarray(np.argsort(order))
  permuted = attend(
    shuffle(queries), shuffle(keys), shuffle(values), place[indices][order]
  )
  np.testing.assert_allclose(permuted, shuffle(messages), atol=1e-6)


def test_nothing_flows_to_a_block_that_nobody_names(rng):
  given = arrays(rng, 6, 8)
  indices = jnp.array([[0, 3], [3, -1], [0, 0]])
  (_, gradients), _ = both(given, indices, (2, 2))[0]
  for gradient in gradients[1:]:
    assert np.all(np.asarray(gradient[2:6]) == 0)
    assert np.all(np.asarray(gradient[:2]) != 0)


def test_gradients_equal_finite_differences(rng):
  given = arrays(rng, 6, 8, d=2, f=2)
  indices = jnp.array([[0, 3], [3, -1], [1, 2]])
  attend = jax.jit(
    lambda *given: sparse.attend_blocks(*given, indices, block=2)
  )
  check_grads(attend, given, 1, ['rev'], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_the_result_has_the_dtype_of_the_values(rng, dtype):
  given = [x.astype(dtype) for x in arrays(rng, 6, 8)]
  indices = jnp.array([[0, 3], [3, -1], [1, 2]])
  messages = sparse.attend_blocks(*given, indices, block=2)
  chex.assert_type(messages, dtype)
  expected = attention.attend(
    *(x.astype(jnp.float32) for x in given),
    mask=token_mask(indices, (2, 2), 6, 8),
  )
  np.testing.assert_allclose(
    np.asarray(messages, np.float32), expected, atol=3e-2
  )
  (_, gradients), _ = both(given, indices, (2, 2))[0]
  chex.assert_type(list(gradients), dtype)
  chex.assert_tree_all_finite(gradients)


def test_rows_as_wide_as_the_keys_take_what_they_hold(rng, monkeypatch):
  """All blocks are read without gathering; rows that are mostly −1 are not."""
  given = arrays(rng, 8, 8)
  full = jnp.tile(jnp.arange(4), (4, 1))
  few = jnp.array([[0, -1, -1, -1], [2, 3, -1, -1]] * 2)
  ran = []

  def watched(name):
    original = getattr(sparse, name)

    def run(*args, **kwargs):
      jax.debug.callback(lambda: ran.append(name))
      return original(*args, **kwargs)

    monkeypatch.setattr(sparse, name, run)

  watched('attend_in_chunks')
  watched('sparse_attention')
  attend = jax.jit(functools.partial(sparse.attend_blocks, block=2))
  for indices, name in (
    (full, 'attend_in_chunks'),
    (few, 'sparse_attention'),
  ):
    ran.clear()
    messages = attend(*given, indices)
    jax.effects_barrier()
    assert ran == [name]
    expected = attention.attend(*given, mask=token_mask(indices, (2, 2), 8, 8))
    np.testing.assert_allclose(messages, expected, atol=2e-6)


def test_one_compilation_for_all_choices(rng):
  given = arrays(rng, 16, 16)
  traces = []

  @jax.jit
  def total(given, indices):
    traces.append(indices)
    return jnp.sum(sparse.attend_blocks(*given, indices, block=2))

  for _ in range(100):
    indices = jnp.asarray(rng.integers(-1, 8, (2, 8, 3)), jnp.int32)
    total(given, indices)
  assert len(traces) == 1
  assert total._cache_size() == 1


@pytest.mark.parametrize(('slots', 'gathered'), [(1, 6), (8, 6 + 2)])
def test_only_what_is_named_is_computed(rng, monkeypatch, slots, gathered):
  monkeypatch.setattr(block_plan, 'STEP', (2, 2 * slots))
  monkeypatch.setattr(block_plan, 'KERNEL_SCORES', 0)
  # Two heads, six pairs of blocks. A wide step is rounded up to a quarter, here
  # of eight: 3 to 4, 1 to 2.
  assert sum(gathered_by(rng, monkeypatch)) == 2 * gathered


@pytest.mark.parametrize('rows', [1, 2])
def test_kernels_are_as_wide_as_a_group_needs(rng, monkeypatch, rows):
  """Rows of both heads are sorted, and eight blocks cut into quarters."""
  monkeypatch.setattr(block_plan, 'KERNEL_ROWS', 1)
  monkeypatch.setattr(block_plan, 'KERNEL_QUERIES', 2 * rows)
  sizes = gathered_by(rng, monkeypatch)
  # Rows of 3, 2, 1 and no blocks: one by one, or both of a length together.
  assert sorted(sizes) == sorted([4, 2, 2, 2] * (2 // rows))


def gathered_by(rng, monkeypatch):
  """How many blocks each step or kernel gathers of the keys, row by row."""
  given = arrays(rng, 8, 20)
  sizes = []
  gather = blocks.gather_blocks

  def counted(array, chosen):
    width = chosen.places.shape[1]
    if array.shape[-1] == given[1].shape[-1]:
      jax.debug.callback(lambda _: sizes.append(width), chosen.places)
    return gather(array, chosen)

  monkeypatch.setattr(blocks, 'gather_blocks', counted)
  monkeypatch.setattr(block_sparse, 'gather_blocks', counted)
  indices = np.full((4, 8), -1)
  for row, named in enumerate([(0, 1, 3), (2,), (), (1, 2)]):
    indices[row, : len(named)] = named
  messages = sparse.attend_blocks(*given, jnp.asarray(indices), block=2)
  jax.block_until_ready(messages)
  jax.effects_barrier()
  return sizes


@pytest.mark.usefixtures('steps')
def test_what_is_not_finite_stays_in_its_image(rng):
  given = arrays(rng, 6, 8, lead=(3,))
  indices = jnp.array([[0, -1], [-1, -1], [3, 1]])
  attend = functools.partial(sparse.attend_blocks, block=2)
  expected = attend(*given, indices)
  broken = [x.at[1].set(jnp.nan) for x in given]
  found = attend(*broken, indices)
  np.testing.assert_allclose(found[::2], expected[::2], atol=1e-6)
  assert np.all(np.isnan(found[1, :2]))


def test_image_blocks_are_blocks_of_their_tokens(rng):
  queries, keys, values = (
    draw(rng, 3, 2, 2, 4), draw(rng, 4, 3, 2, 4), draw(rng, 4, 3, 2, 5)
  )  # fmt: skip
  indices = jnp.array([[0, 2], [-1, -1], [3, 1]])
  messages = sparse.attend_image_blocks(queries, keys, values, indices)
  expected = attention.attend(
    *(x.reshape(-1, *x.shape[2:]) for x in (queries, keys, values)),
    mask=token_mask(indices, (2, 3), 6, 12),
  )
  np.testing.assert_allclose(messages.reshape(6, 2, 5), expected, atol=2e-6)
  assert np.all(np.asarray(messages[1]) == 0)


@pytest.mark.usefixtures('unchecked')
def test_wrong_shapes_are_named(rng):
  queries, keys, values = arrays(rng, 6, 8)
  indices = jnp.zeros((3, 2), jnp.int32)
  attend = functools.partial(sparse.attend_blocks, queries, keys, values)
  with pytest.raises(ValueError, match=r'\(\*b, h, 2, k\).*\(3, 2\)'):
    attend(indices, block=3)
  with pytest.raises(TypeError, match='must be an integer type'):
    attend(indices.astype(jnp.float32), block=2)
  with pytest.raises(ValueError, match='block=0 must be at least 1'):
    attend(indices, block=0)
  with pytest.raises(ValueError, match='do not fit together'):
    sparse.attend_blocks(queries, keys[..., :2], values, indices, block=2)
