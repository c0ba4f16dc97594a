"""The causal graph against float64 NumPy, and how it enters a context."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.causal_graph import CausalGraph
from msba_jax.models.context import Context, batch, solo
from msba_jax.models.graph import OWN
from tests.layers.causal_test import gelu, softmax

N, M, E = 5, 7, 6
LOG_FLOOR = np.log(1e-6)


class Reference(NamedTuple):
  """C, W, G (l, n, n) and the penalties, of one set of nodes."""

  scores: np.ndarray
  graphs: np.ndarray
  influence: np.ndarray
  acyclicity: float
  edges: float


def sigmoid(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def reference(params, nodes, valid, *, levels, bias=0.0):
  """The equations of the docstring for the valid nodes alone, in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  size, there = len(nodes), np.flatnonzero(valid)
  bias = np.broadcast_to(bias, (size, size))[np.ix_(there, there)]
  nodes = np.asarray(nodes, np.float64)[there]
  n, e = nodes.shape
  read = nodes * np.sqrt(e)
  queries, keys = (read @ p[name]['kernel'] for name in ('queries', 'keys'))
  logits = queries @ keys.T / np.sqrt(keys.shape[1]) + bias
  logits += np.log1p(np.exp(p['scale'])) * nodes @ nodes.T
  if 'gate' in p:
    seen = read @ p['gate']['kernel']
    rows, columns = seen[:, None], seen[None]
    hidden = (
      (rows - columns) @ p['gate_difference']
      + np.abs(rows - columns) @ p['gate_distance']
      + (rows * columns) @ p['gate_product']
    )
    hidden = gelu(hidden + p['gate_bias'])
    gate = sigmoid(hidden @ p['gate_out'][:, 0] + p['gate_out_bias'])
    logits += np.log(gate)
  scores, graphs = [softmax(logits + OWN * np.eye(n))], []
  for level in range(levels):
    kappa = 0.05 + 2 * sigmoid(p['thresholds'][level])
    graph = np.maximum(scores[-1] - kappa / n, 0) * (1 - np.eye(n))
    graphs.append(graph)
    if level + 1 < levels:
      alpha = sigmoid(p['mixes'][level])
      total = graph.sum(axis=1, keepdims=True)
      normal = np.where(total > 0, graph / np.maximum(total, 1e-300), np.eye(n))
      mixed = alpha * scores[-1] + (1 - alpha) * normal @ scores[-1]
      scores.append(mixed / mixed.sum(axis=1, keepdims=True))
  matrices = [scores, graphs, [w + w @ w + w @ w @ w for w in graphs]]
  placed = np.zeros((3, levels, size, size))
  placed[np.ix_(range(3), range(levels), there, there)] = matrices
  cycles = [-np.linalg.slogdet(np.eye(n) - w)[1] / n for w in graphs]
  return Reference(*placed, sum(cycles), sum(w.sum() / n for w in graphs))


def embed(regions):
  """The first region of the first level."""
  return regions[0, :, 0]


@functools.cache
def applied(levels=3, gated=True, most=32):
  """Parameters, none of a special value, and a compiled `apply` of them."""
  module = CausalGraph(width=4, hidden=5, scale=2.0, gated=gated, most=most)
  options = {'levels': levels, 'embed': embed}
  params = jax.jit(functools.partial(module.init, **options))(
    jax.random.key(0), batch(jnp.ones(2, bool)), jnp.ones((2, E))
  )['params']
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  leaves = [x + 0.3 * rng.normal(size=x.shape).astype('f4') for x in leaves]
  params = jax.tree.unflatten(tree, leaves)

  @jax.jit
  def apply(params, context, solos):
    return module.apply({'params': params}, context, solos, **options)

  return params, apply


@pytest.fixture
def vectors(rng):
  """Unit vectors of images that ask and of a memory."""
  drawn = rng.normal(size=(N + M, E))
  drawn = drawn / np.linalg.norm(drawn, axis=1)[:, None]
  return jnp.asarray(drawn[:N], 'f4'), jnp.asarray(drawn[N:], 'f4')


def memory_of(foreign, valid=None, bias=None):
  regions = jnp.tile(foreign[None, :, None], (2, 1, 3, 1))
  valid = jnp.ones(len(foreign), bool) if valid is None else valid
  return Context(regions, valid, bias)


def check_each(told, params, solos, foreign, allowed, *, levels=3, bias=None):
  """Every asking image with the images of its row of `allowed` as nodes."""
  found = []
  for n in range(len(solos)):
    nodes = np.concatenate([solos[n : n + 1], foreign])
    own = np.zeros((len(nodes), len(nodes)))
    if bias is not None:
      own[0, 1:] = bias[n]
    found.append(
      reference(params, nodes, [True, *allowed[n]], levels=levels, bias=own)
    )
  for name, expected in {
    'scores': np.stack([x.scores[:, 0, 1:] for x in found], axis=1),
    'influence': np.stack([x.influence[:, 0, 1:] for x in found], axis=1),
    'dependents': np.stack([x.graphs[:, :, 0].sum(1) for x in found], axis=1),
    'acyclicity': np.mean([x.acyclicity for x in found]),
    'edges': np.mean([x.edges for x in found]),
  }.items():
    np.testing.assert_allclose(told[name], expected, atol=2e-5, err_msg=name)
    assert np.abs(expected).max() > 1e-3, name


@pytest.mark.parametrize('gated', [True, False])
@pytest.mark.parametrize('levels', [1, 3])
def test_the_graph_of_a_batch_equals_the_reference(rng, vectors, levels, gated):
  solos, _ = vectors
  params, apply = applied(levels, gated)
  valid = np.array([True, True, False, True, True])
  bias = rng.normal(size=(N, N))
  context = batch(jnp.asarray(valid), bias=jnp.asarray(bias, jnp.float32))
  weighed, told = apply(params, context, solos)
  expected = reference(params, solos, valid, levels=levels, bias=bias)
  for name, value in {
    'scores': expected.scores,
    'graph': expected.graphs,
    'influence': expected.influence,
    'dependents': expected.graphs.sum(axis=1),
    'acyclicity': expected.acyclicity,
    'edges': expected.edges,
  }.items():
    np.testing.assert_allclose(told[name], value, atol=2e-5, err_msg=name)
    assert np.abs(value).max() > 1e-3, name
  off = ~np.eye(N, dtype=bool)
  found = np.log(np.maximum(expected.scores, 1e-6))
  np.testing.assert_allclose(weighed.bias[:, off], found[:, off], atol=1e-3)
  assert np.all(np.diagonal(weighed.bias, axis1=1, axis2=2) <= OWN)
  np.testing.assert_array_equal(weighed.valid, valid)
  np.testing.assert_allclose(
    np.sum(told['scores'], axis=-1), np.tile(valid, (levels, 1)), atol=1e-6
  )


@pytest.mark.parametrize('gated', [True, False])
def test_the_graph_of_each_context_equals_the_reference(rng, vectors, gated):
  solos, foreign = vectors
  params, apply = applied(gated=gated)
  valid = np.arange(M) != 2
  bias = rng.normal(size=(N, M))
  context = memory_of(
    foreign, jnp.asarray(valid), jnp.asarray(bias, jnp.float32)
  )
  weighed, told = apply(params, context, solos)
  allowed = np.tile(valid, (N, 1))
  check_each(told, params, solos, foreign, allowed, bias=bias)
  np.testing.assert_allclose(
    weighed.bias, np.log(np.maximum(told['scores'], 1e-6)), atol=1e-5
  )
  np.testing.assert_allclose(weighed.bias[..., 2], LOG_FLOOR, atol=1e-5)
  np.testing.assert_array_equal(weighed.regions, context.regions)
  assert 'graph' not in told


def test_of_a_larger_memory_the_nearest_are_nodes(vectors):
  """Those with the largest cosine among the valid; others have the floor."""
  solos, foreign = vectors
  params, apply = applied(most=3)
  valid = np.arange(M) != 2
  weighed, told = apply(params, memory_of(foreign, jnp.asarray(valid)), solos)
  cosines = np.where(valid, np.asarray(solos @ foreign.T), -np.inf)
  allowed = cosines >= np.sort(cosines, axis=1)[:, -3:][:, :1]
  assert np.all(allowed.sum(axis=1) == 3)
  assert len(np.unique(allowed, axis=0)) > 1
  check_each(told, params, solos, foreign, allowed)
  for name in ('scores', 'influence'):
    assert np.all(np.asarray(told[name])[:, ~allowed] == 0)
  bias = np.asarray(weighed.bias)
  np.testing.assert_allclose(bias[:, ~allowed], LOG_FLOOR, atol=1e-5)
  assert bias[:, allowed].max() > LOG_FLOOR + 5


@pytest.mark.parametrize('most', [M, 4])
def test_a_choice_of_all_that_are_there_is_none(vectors, most):
  solos, foreign = vectors
  valid = jnp.array([True, False, True, True, False, False, True])
  context = memory_of(foreign, valid)
  params, apply = applied()
  _, apply_most = applied(most=most)
  expected, found = (
    apply(params, context, solos),
    apply_most(params, context, solos),
  )
  chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_a_batch_beside_a_memory_is_switched_by_masks(vectors):
  solos, foreign = vectors
  params, apply = applied()
  everyone = jnp.ones(N, bool)
  memory = memory_of(foreign)
  nobody = memory._replace(valid=~memory.valid)
  alone, told = apply(params, batch(everyone), solos)
  joint, joint_told = apply(params, batch(everyone, memory=nobody), solos)
  np.testing.assert_allclose(joint.bias, alone.bias, atol=1e-5)
  for name in ('scores', 'influence'):
    np.testing.assert_array_equal(joint_told[name][..., N:], 0)
    np.testing.assert_allclose(joint_told[name][..., :N], told[name], atol=1e-6)
  foreign_alone, foreign_told = apply(params, memory, solos)
  joint, joint_told = apply(params, batch(~everyone, memory=memory), solos)
  np.testing.assert_allclose(joint.memory.bias, foreign_alone.bias, atol=1e-5)
  for name in ('scores', 'influence'):
    np.testing.assert_array_equal(joint_told[name][..., :N], 0)
    np.testing.assert_allclose(
      joint_told[name][..., N:], foreign_told[name], atol=1e-6
    )
  for name in ('dependents', 'acyclicity', 'edges'):
    np.testing.assert_allclose(joint_told[name], foreign_told[name], atol=1e-6)


def test_images_that_ask_together_do_not_meet(vectors):
  solos, foreign = vectors
  params, apply = applied()

  @jax.jit
  @jax.grad
  def gradient(solos):
    weighed, told = apply(params, memory_of(foreign), solos)
    return (
      jnp.sum(weighed.bias[:, 1] ** 2)
      + jnp.sum(told['influence'][:, 1] ** 2)
      + jnp.sum(told['dependents'][:, 1] ** 2)
    )

  found = np.asarray(gradient(solos))
  assert np.abs(found[1]).max() > 0
  assert np.all(found[[0, 2, 3, 4]] == 0)


@pytest.mark.parametrize('kind', ['batch', 'memory'])
def test_without_a_node_all_is_finite(vectors, kind):
  solos, foreign = vectors
  params, apply = applied()
  context = batch(jnp.zeros(N, bool))
  if kind == 'memory':
    context = memory_of(foreign, jnp.zeros(M, bool))

  @jax.jit
  def total(params, solos):
    weighed, told = apply(params, context, solos)
    parts = (jnp.sum(weighed.bias), jax.tree.map(jnp.sum, told))
    return sum(jax.tree.leaves(parts)), (weighed, told)

  (_, (weighed, told)), gradients = jax.value_and_grad(
    total, (0, 1), has_aux=True
  )(params, solos)
  chex.assert_tree_all_finite((weighed, told, gradients))
  for leaf in jax.tree.leaves(told):
    assert np.all(np.asarray(leaf) == 0)


def test_solo_stays_solo(vectors):
  params, apply = applied()
  assert apply(params, solo, vectors[0]) == (solo, {})


@pytest.mark.parametrize('kind', ['batch', 'memory'])
def test_a_bias_of_each_level_is_refused(vectors, kind):
  solos, foreign = vectors
  params, apply = applied()
  context = batch(jnp.ones(N, bool), bias=jnp.zeros((3, N, N)))
  if kind == 'memory':
    context = memory_of(foreign, bias=jnp.zeros((3, N, M)))
  with pytest.raises(ValueError, match=r'takes a bias \(n, m\) for all levels'):
    apply(params, context, solos)
