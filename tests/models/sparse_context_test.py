"""NEXUS in the batch against NumPy, and the properties of MSBA with it."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from msba_jax.models.backbones.conv import ConvNet
from msba_jax.models.context import Context, batch, solo
from msba_jax.models.manifold_keys import ManifoldKeys
from msba_jax.models.msba import msba
from msba_jax.models.sparse_context import SparseContext
from tests.layers.causal_test import gelu, softmax
from tests.models.castle_test import normalized
from tests.models.conftest import TINY

VALID = jnp.ones(8, bool)
SMALL = SparseContext(2, own=1, foreign=3, block=2)


def perturbed(params, size=0.3):
  """Parameters none of which is a special value."""
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  leaves = [x + size * rng.normal(size=x.shape).astype('f4') for x in leaves]
  return jax.tree.unflatten(tree, leaves)


@functools.cache
def parameters():
  """Of all stages here: the choice of blocks has none."""
  regions = jnp.zeros((1, 2, 4, 8))
  return perturbed(
    jax.jit(SMALL.init)(jax.random.key(0), regions, batch(VALID[:2]))
  )


@functools.cache
def stage(module):
  """Parameters and the compiled stage, for regions 8 wide."""
  return parameters(), jax.jit(module.apply)


def dense(x, p):
  return x @ p['kernel'] + p.get('bias', 0)


def feed_forward(x, p):
  return dense(gelu(dense(x, p['inner'])), p['outer'])


def reference(module, params, regions, foreign, others, bias):
  """The stage in float64: one block at a time, over the context given."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)['params']
  u, pool = (np.asarray(x, np.float64) for x in (regions, foreign))
  levels, n, r, d = u.shape
  m, t, h = pool.shape[1], module.block, module.num_heads
  asking, answering = (normalized(x, **p['norm']) for x in (u, pool))
  q, k, v = (dense(asking, p[name]) for name in ('queries', 'keys', 'values'))
  foreign_k, foreign_v = (dense(answering, p[x]) for x in ('keys', 'values'))
  y, paid = u.copy(), np.zeros((levels, r, h, n, m + 1))
  for lv, a, i in np.ndindex(levels, n, r // t):
    rows = slice(i * t, i * t + t)
    means = k[lv, a].reshape(-1, t, d).mean(1) @ q[lv, a, rows].mean(0)
    tokens = [
      (m, k[lv, a, j * t + s], v[lv, a, j * t + s], 0)
      for j in np.argsort(-means)[: module.own]
      for s in range(t)
    ]
    means = foreign_k[lv].reshape(m, -1, t, d).mean(2) @ q[lv, a, rows].mean(0)
    means = means / np.sqrt(d) + bias[lv, a][:, None]
    means = np.where(others[a][:, None], means, -np.inf).ravel()
    for place in np.argsort(-means)[: module.foreign]:
      if np.isfinite(means[place]):
        b, j = divmod(place, r // t)
        at = [(lv, b, j * t + s) for s in range(t)]
        tokens += [(b, foreign_k[x], foreign_v[x], bias[lv, a, b]) for x in at]
    images, keys, values, added = (
      np.stack(x) for x in zip(*tokens, strict=True)
    )
    scores = np.einsum(
      'thd,shd->hts',
      q[lv, a, rows].reshape(t, h, -1),
      keys.reshape(len(keys), h, -1),
    )
    weights = softmax(scores / np.sqrt(d / h) + added)
    for b in range(m + 1):
      part = weights[..., images == b].sum(-1)
      paid[lv, rows, :, a, b] = part.T
    if others[a].any():
      message = np.einsum(
        'hts,shd->thd', weights, values.reshape(len(values), h, -1)
      ).reshape(t, d)
      x = u[lv, a, rows]
      opened = feed_forward(np.concatenate([x, message], -1), p['gate'])
      x = x + dense(message, p['out']) / (1 + np.exp(-opened))
      inner = normalized(x, **p['norm_feed_forward'])
      y[lv, a, rows] = x + feed_forward(inner, p['feed_forward'])
  return y, paid


def array(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def assert_equals_reference(module, regions, context, pool, others, bias):
  params, apply = stage(module)
  found, aux = apply(params, regions, context)
  expected, paid = reference(module, params, regions, pool, others, bias)
  np.testing.assert_allclose(found, expected, atol=2e-5)
  np.testing.assert_allclose(aux['attention'], paid[..., :-1], atol=2e-6)
  np.testing.assert_allclose(aux['own'], paid[..., -1], atol=2e-6)
  assert {x.dtype for x in (found, *aux.values())} == {
    jnp.dtype('float32'),
    jnp.dtype('int32'),
  }
  return aux


@hypothesis.settings(max_examples=3)
@hypothesis.example(levels=2, n=3, memory=2, sizes=(1, 4), keep=(2, 3), seed=0)
@hypothesis.given(
  levels=st.integers(1, 2),
  n=st.integers(1, 4),
  memory=st.integers(0, 3),
  sizes=st.sampled_from([(1, 4), (2, 4), (3, 3), (2, 6)]),
  keep=st.tuples(st.integers(1, 4), st.integers(1, 9)),
  seed=st.integers(0, 99),
)
def test_the_stage_equals_the_reference(levels, n, memory, sizes, keep, seed):
  """In the batch and a memory beside it: any sizes, masks and biases."""
  rng = np.random.default_rng(seed)
  block, r = sizes
  module = SparseContext(2, own=keep[0], foreign=keep[1], block=block)
  regions, beside = (
    array(rng, levels, n, r, 8),
    array(rng, levels, memory, r, 8),
  )
  valid = rng.random(n + memory) < 0.7
  bias = rng.normal(size=(levels, n, n + memory)).astype('f4')
  parts = [jnp.asarray(x) for x in np.split(bias, [n], axis=2)]
  foreign = Context(beside, jnp.asarray(valid[n:]), parts[1])
  context = batch(
    jnp.asarray(valid[:n]), memory=foreign if memory else None, bias=parts[0]
  )
  aux = assert_equals_reference(
    module,
    regions,
    context,
    np.concatenate([regions, beside], axis=1),
    valid & ~np.eye(n, n + memory, dtype=bool),
    bias,
  )
  count = r // block
  chex.assert_shape(aux['blocks'], (levels, n, count, keep[1]))
  chex.assert_shape(aux['own_blocks'], (levels, n, count, keep[0]))
  for name, most in (('blocks', None), ('own_blocks', count)):
    for row in np.asarray(aux[name]).reshape(-1, aux[name].shape[-1]):
      named = row[row >= 0]
      assert np.all(row[: len(named)] >= 0)
      assert len(set(named)) == len(named)
      if most:
        assert len(named) == min(most, keep[0])


def test_foreign_images_alone_equal_the_reference(rng):
  """A `Context`, whose bias is shared by the levels, or there is none."""
  regions, pool = array(rng, 2, 3, 4, 8), array(rng, 2, 5, 4, 8)
  valid = np.array([True, False, True, True, True])
  bias = rng.normal(size=(3, 5)).astype('f4')
  others = np.broadcast_to(valid, (3, 5))
  for given in (jnp.asarray(bias), None):
    used = np.broadcast_to(0 if given is None else bias, (2, 3, 5))
    context = Context(pool, jnp.asarray(valid), given)
    assert_equals_reference(SMALL, regions, context, pool, others, used)


def test_all_blocks_are_dense_attention_over_all_images(rng):
  """own = foreign = all: the size of blocks makes no difference."""
  regions = array(rng, 2, 3, 4, 8)
  bias = array(rng, 3, 3)
  context = batch(VALID[:3], bias=bias)
  params, _ = stage(SMALL)
  found = [
    jax.jit(SparseContext(2, own=own, foreign=foreign, block=block).apply)(
      params, regions, context
    )[0]
    for own, foreign, block in ((1, 2, 4), (2, 4, 2), (4, 50, 1))
  ]
  for other in found[1:]:
    np.testing.assert_allclose(other, found[0], atol=2e-6)
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)['params']
  inputs = normalized(np.asarray(regions, np.float64), **params['norm'])
  q, k, v = (
    dense(inputs, params[x]).reshape(2, 3, 4, 2, 4)
    for x in ('queries', 'keys', 'values')
  )
  scores = np.einsum('lnrhd,lmshd->lnhrms', q, k) / 2
  scores += np.where(np.eye(3), 0, bias)[None, :, None, None, :, None]
  weights = softmax(scores.reshape(*scores.shape[:4], -1)).reshape(scores.shape)
  message = np.einsum('lnhrms,lmshd->lnrhd', weights, v).reshape(2, 3, 4, 8)
  u = np.asarray(regions, np.float64)
  opened = feed_forward(np.concatenate([u, message], -1), params['gate'])
  y = u + dense(message, params['out']) / (1 + np.exp(-opened))
  inner = normalized(y, **params['norm_feed_forward'])
  y = y + feed_forward(inner, params['feed_forward'])
  np.testing.assert_allclose(found[0], y, atol=2e-5)


def test_only_chosen_regions_have_a_gradient(rng):
  """Of the regions themselves and of the bias, at one block of one level."""
  regions, bias = array(rng, 2, 4, 4, 8), array(rng, 4, 4)
  params, apply = stage(SMALL)
  context = batch(VALID[:4], bias=bias)
  _, aux = apply(params, regions, context)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(regions, bias):
    found, _ = apply(params, regions, context._replace(bias=bias))
    return jnp.sum(jnp.sin(found[1, 2, 2:]))  # its second block

  by_region, by_bias = (np.asarray(x) for x in gradient(regions, bias))
  strength = np.abs(by_region).max(-1).reshape(2, 8, 2).max(-1)
  read = set(np.asarray(aux['blocks'])[1, 2, 1].tolist())
  read |= {4 + x for x in np.asarray(aux['own_blocks'])[1, 2, 1].tolist()}
  assert len(read) == 4
  expected = np.zeros((2, 8), bool)
  expected[1, [*read, 5]] = True
  np.testing.assert_array_equal(strength > 0, expected)
  chosen = np.zeros((4, 4), bool)
  chosen[2, np.asarray(aux['blocks'])[1, 2, 1] // 2] = True
  np.testing.assert_array_equal(by_bias != 0, chosen)


def test_the_gradient_is_that_of_finite_differences(rng):
  regions, bias = array(rng, 1, 3, 2, 8), array(rng, 3, 3)
  module = SparseContext(2, own=1, foreign=2)
  params, apply = stage(module)

  def value(regions, bias):
    return apply(params, regions, batch(VALID[:3], bias=bias))[0]

  check_grads(
    jax.jit(value), (regions, bias), order=1, modes=['rev'], atol=2e-2,
    rtol=2e-2, eps=1e-3,
  )  # fmt: skip


def test_images_without_others_keep_their_regions_exactly(rng):
  regions = array(rng, 2, 3, 4, 8)
  params, apply = stage(SMALL)
  for context in (
    solo,
    batch(~VALID[:3]),
    batch(~VALID[:3], memory=Context(regions, ~VALID[:3])),
    Context(regions[:, :2], ~VALID[:2]),
    Context(regions[:, :0], VALID[:0]),
  ):
    found, aux = apply(params, regions, context)
    np.testing.assert_array_equal(found, regions)
    for name in aux.keys() & {'blocks'}:
      assert np.all(np.asarray(aux[name]) == -1)
  # Image 1 is the only one there is: it has no other, the rest have it.
  found, aux = apply(params, regions, batch(jnp.arange(3) == 1))
  np.testing.assert_array_equal(found[:, 1], regions[:, 1])
  assert np.all(np.abs(found - regions)[:, [0, 2]].max(-1) > 1e-4)
  assert np.all(np.asarray(aux['attention'])[..., 1, :] == 0)
  total = aux['attention'].sum(-1) + aux['own']
  np.testing.assert_allclose(total, 1, atol=1e-6)


def test_images_that_ask_together_do_not_influence_each_other(rng):
  """Neighbours, of all alike or of each, as one image asks alone."""
  regions, pool = array(rng, 2, 3, 4, 8), array(rng, 2, 5, 4, 8)
  context = Context(pool, VALID[:5], None)
  params, apply = stage(SMALL)
  found, _ = apply(params, regions, context)
  changed, _ = apply(params, regions.at[:, 1:].set(7.0), context)
  np.testing.assert_array_equal(changed[:, 0], found[:, 0])
  one = jax.jit(
    jax.vmap(
      lambda own: SMALL.apply(params, own[:, None], context)[0][:, 0], 1, 1
    )
  )
  np.testing.assert_allclose(one(regions), found, atol=1e-5)


def test_it_takes_other_keys(rng):
  regions = array(rng, 2, 3, 4, 8)
  keys = functools.partial(ManifoldKeys, variant='vanilla', charts=2)
  module = SparseContext(2, own=1, foreign=2, keys=keys)
  context = batch(VALID[:3])
  params = jax.jit(module.init)(jax.random.key(0), regions, context)
  assert 'kernel' not in params['params']['keys']

  @jax.jit
  @jax.grad
  def gradient(params):
    return jnp.sum(jnp.sin(3 * module.apply(params, regions, context)[0]))

  leaves = jax.tree.leaves(gradient(perturbed(params))['params']['keys'])
  assert leaves
  assert all(np.abs(np.asarray(x)).max() > 1e-5 for x in leaves)


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize(
  ('module', 'said'),
  [
    (SparseContext(2, block=3), 'block=3 must divide the 4 regions'),
    (SparseContext(2, block=0), 'must be at least 1'),
    (SparseContext(2, own=0), 'own=0'),
    (SparseContext(2, foreign=-1), 'foreign=-1'),
    (SparseContext(3), 'num_heads=3 must divide'),
  ],
)
def test_wrong_sizes_are_named(rng, module, said):
  with pytest.raises(ValueError, match=said):
    jax.eval_shape(
      module.init, jax.random.key(0), array(rng, 1, 2, 4, 8), batch(VALID[:2])
    )


@functools.cache
def system():
  """An MSBA with the stage in it, its parameters, and its compiled call."""
  stages = msba(
    ConvNet(TINY), features=8, embedding=6, num_heads=2, num_classes=5
  )
  model = stages.clone(bcp=SMALL)
  refine = functools.partial(model.apply, method='refine')
  params = jax.jit(functools.partial(model.init, method='refine'))(
    jax.random.key(0), jnp.zeros((2, 2, 4, 8))
  )

  @jax.jit
  def value_and_gradient(params, regions, valid):
    def value(params, regions):
      embeddings, out = refine(params, regions, context=batch(valid))
      total = jnp.sum(jnp.where(valid[:, None], embeddings, 0) ** 3)
      return total + jnp.sum(out['proxies'] ** 2), out

    with jax.default_matmul_precision('highest'):
      return jax.value_and_grad(value, (0, 1), has_aux=True)(params, regions)

  params = perturbed(params, 0.1)
  run = jax.jit(lambda *given: refine(params, given[0], context=given[1]))
  return params, run, value_and_gradient


@pytest.fixture
def regions(rng):
  """Of eight images."""
  return array(rng, 2, 8, 4, 8)


def test_permuting_the_batch_permutes_the_outputs(regions, rng):
  order = rng.permutation(8)
  _, run, _ = system()
  _, out = run(regions, batch(VALID))
  _, permuted = run(regions[:, order], batch(VALID))
  np.testing.assert_allclose(
    permuted['context'], out['context'][order], atol=2e-6
  )
  expected = out['attention'][:, :, :, order][..., order]
  chex.assert_shape(expected, (2, 4, 2, 8, 8))
  np.testing.assert_allclose(permuted['attention'], expected, atol=2e-6)
  chosen, again = (x['aux']['bcp']['blocks'] for x in (out, permuted))
  np.testing.assert_array_equal(
    order[again // 2] * 2 + again % 2, chosen[:, order]
  )


def test_a_masked_image_has_no_influence_and_all_else_has_some(regions):
  params, _, value_and_gradient = system()
  valid = VALID.at[3].set(False)
  _, (by_params, found) = value_and_gradient(params, regions, valid)
  strength = np.abs(np.asarray(found)).max((0, 2, 3))
  np.testing.assert_array_equal(strength > 0, valid)
  assert set(by_params['params']['bcp']) == {
    *('norm', 'queries', 'keys', 'values', 'gate', 'out'),
    *('norm_feed_forward', 'feed_forward'),
  }
  for path, leaf in jax.tree_util.tree_leaves_with_path(by_params):
    # More than rounding leaves.
    assert np.abs(np.asarray(leaf)).max() > 1e-5, jax.tree_util.keystr(path)


def test_one_image_is_solo(regions):
  _, run, _ = system()
  _, out = run(regions[:, :1], batch(VALID[:1]))
  chex.assert_tree_all_finite(out)
  np.testing.assert_allclose(out['context'], out['solo'], atol=1e-6)
  _, alone = run(regions, solo)
  np.testing.assert_allclose(out['solo'], alone['solo'][:1], atol=1e-6)


def test_an_empty_context_is_solo(regions):
  _, run, _ = system()
  _, alone = run(regions, solo)
  embeddings, out = run(regions, batch(~VALID))
  np.testing.assert_array_equal(embeddings, out['solo'])
  np.testing.assert_allclose(embeddings, alone['solo'], atol=1e-6)
  _, foreign = run(regions, Context(regions, ~VALID, None))
  np.testing.assert_array_equal(foreign['context'], foreign['solo'])


def test_padding_with_invalid_images_changes_nothing(regions):
  _, run, _ = system()
  embeddings, out = run(regions[:, :5], batch(VALID[:5]))
  assert np.abs(embeddings - out['solo']).max() > 1e-3
  padded, _ = run(regions, batch(VALID.at[5:].set(False)))
  np.testing.assert_allclose(padded[:5], embeddings, atol=1e-6)
  other, _ = run(regions.at[:, 5:].set(9.0), batch(VALID.at[5:].set(False)))
  np.testing.assert_array_equal(other[:5], padded[:5])


def test_batch_and_memory_switch_by_mask(regions, rng):
  _, run, _ = system()
  memory = Context(array(rng, *regions.shape), VALID, None)
  nobody = memory._replace(valid=~VALID)
  for joint, expected in (
    (batch(VALID, memory=nobody), batch(VALID)),
    (batch(~VALID, memory=memory), memory),
    (batch(~VALID, memory=nobody), solo),
  ):
    np.testing.assert_allclose(
      run(regions, joint)[0], run(regions, expected)[0], atol=2e-6
    )


def test_the_same_numbers_on_eight_devices(regions):
  params, _, value_and_gradient = system()
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )

  def sharded(array, *axes):
    spec = jax.sharding.PartitionSpec(*axes)
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))

  (_, expected), gradient = value_and_gradient(params, regions, VALID)
  (_, found), again = value_and_gradient(
    sharded(params), sharded(regions, None, 'data'), sharded(VALID, 'data')
  )
  np.testing.assert_allclose(found['context'], expected['context'], atol=1e-6)
  np.testing.assert_array_equal(
    *(out['aux']['bcp']['blocks'] for out in (found, expected))
  )
  norm = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
  chex.assert_trees_all_close(again, gradient, atol=1e-5 * norm)
