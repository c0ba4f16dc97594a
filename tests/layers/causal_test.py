"""Tests of `msba_jax.layers.causal` against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.layers import causal


def softmax(scores):
  exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
  return exponentials / exponentials.sum(axis=-1, keepdims=True)


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def float32(*arrays):
  return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def random_graph(rng, n, *, acyclic):
  """Edge weights whose rows sum to less than one."""
  graph = rng.random((n, n)) * (rng.random((n, n)) < 0.5)
  graph = np.tril(graph, -1) if acyclic else graph * (1 - np.eye(n))
  order = rng.permutation(n)
  graph = graph[order][:, order]
  return graph / (graph.sum(axis=1, keepdims=True) + 0.3)


def gate_params(rng, d, e):
  return causal.GateParams(
    *float32(
      *(rng.normal(size=(d, e)) for _ in range(3)),
      rng.normal(size=e), rng.normal(size=e), rng.normal(),
    )
  )  # fmt: skip


def test_the_gate_equals_its_equation_and_has_a_direction(rng, variant):
  asking, answering = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 5, 3))
  params = gate_params(rng, 3, 6)
  found = variant(causal.directed_gate)(*float32(asking, answering), params)
  p = [np.asarray(x, np.float64) for x in params]
  rows, columns = asking[:, :, None], answering[:, None]
  pairs = np.concatenate(
    [rows - columns, np.abs(rows - columns), rows * columns], axis=-1
  )
  logits = gelu(pairs @ np.concatenate(p[:3]) + p[3]) @ p[4] + p[5]
  np.testing.assert_allclose(found, -np.log1p(np.exp(-logits)), atol=2e-5)
  own = causal.directed_gate(*float32(asking, asking), params)
  assert np.abs(own - np.swapaxes(own, 1, 2)).max() > 0.1
  blind = params._replace(difference=jnp.zeros_like(params.difference))
  own = causal.directed_gate(*float32(asking, asking), blind)
  np.testing.assert_allclose(own, np.swapaxes(own, 1, 2), atol=1e-6)


def test_scores_equal_the_reference(rng, variant):
  queries, keys = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 5, 3))
  gate = -rng.random((2, 4, 5)) * 9
  mask = rng.random((2, 4, 5)) < 0.7
  mask[0, 1] = False
  found = variant(causal.causal_scores)(
    *float32(queries, keys, gate), mask=jnp.asarray(mask)
  )
  scores = queries @ np.swapaxes(keys, 1, 2) / np.sqrt(3) + gate
  with np.errstate(invalid='ignore'):
    expected = softmax(np.where(mask, scores, -np.inf))
  expected[0, 1] = 0
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_logarithm_suppresses_where_a_factor_does_not(rng):
  """Scores of deviation 0.5, 48 % of the columns gated with 0.001."""
  queries = rng.normal(size=(64, 16))
  keys = rng.normal(size=(100, 16)) / 2
  gated = np.arange(100) < 48
  gate = np.broadcast_to(np.where(gated, 0.001, 1.0), (64, 100))
  found = causal.causal_scores(*float32(queries, keys, np.log(gate)))
  scores = queries @ keys.T / 4
  assert 0.4 < scores.std() < 0.6
  plain = softmax(scores)[:, gated].sum(axis=1).mean()
  factor = softmax(scores * gate)[:, gated].sum(axis=1).mean()
  logarithm = np.asarray(found)[:, gated].sum(axis=1).mean()
  assert plain > 0.4
  assert factor > 0.9 * plain
  assert logarithm < 0.002


def test_the_graph_and_its_propagation(rng, variant):
  """Two levels of three images each, the last node of one is not there."""
  scores = softmax(rng.normal(size=(2, 4, 4)))
  valid = np.array([[True] * 4, [True, True, True, False]])
  pairs = valid[:, :, None] & valid[:, None]
  scores = np.where(pairs, scores, 0)
  scores = scores / np.maximum(scores.sum(axis=-1, keepdims=True), 1e-300)
  kappa, alpha = np.array([0.8, 1.1]), np.array([0.3, 0.9])
  graph = variant(causal.causal_graph)(
    *float32(scores, kappa), valid=jnp.asarray(valid)
  )
  count = valid.sum(axis=1)
  expected = np.maximum(scores - (kappa / count)[:, None, None], 0)
  expected = expected * (1 - np.eye(4)) * pairs
  np.testing.assert_allclose(graph, expected, atol=1e-6)
  assert (expected.sum(axis=-1) < 1).all()

  graph = expected.copy()
  graph[0, 2] = 0  # a node without edges keeps its own row
  found = variant(causal.propagate_causal_graph)(
    *float32(scores, graph, alpha), valid=jnp.asarray(valid)
  )
  total = graph.sum(axis=-1, keepdims=True)
  normal = np.where(total > 0, graph / np.maximum(total, 1e-300), np.eye(4))
  a = alpha[:, None, None]
  reference = np.where(pairs, a * scores + (1 - a) * normal @ scores, 0)
  reference /= np.maximum(reference.sum(axis=-1, keepdims=True), 1e-300)
  np.testing.assert_allclose(found, reference, atol=1e-6)
  np.testing.assert_allclose(found[0, 2], scores[0, 2], atol=1e-6)
  np.testing.assert_allclose(np.sum(found, axis=-1), valid, atol=1e-6)


@pytest.mark.parametrize('n', [1, 2, 7, 40])
def test_the_penalty_is_zero_exactly_on_acyclic_graphs(rng, variant, n):
  graphs = np.stack([random_graph(rng, n, acyclic=True) for _ in range(5)])
  found = variant(causal.acyclicity_penalty)(*float32(graphs))
  np.testing.assert_array_equal(found, 0)
  if n > 1:
    graphs[:, 0, 1], graphs[:, 1, 0] = 0.2, 0.1
    found = variant(causal.acyclicity_penalty)(*float32(graphs))
    assert (np.asarray(found) > 0).all()


def test_the_penalty_is_that_of_notears_to_first_order(rng):
  """tr(exp W) − n = Σ tr(W^k) / k!, −log det(I − W) = Σ tr(W^k) / k."""
  graph = 1e-3 * random_graph(rng, 6, acyclic=False)
  eigenvalues = np.linalg.eigvals(graph)
  notears = float(np.sum(np.expm1(eigenvalues) - eigenvalues).real)
  ours = float(-np.sum(np.log1p(-eigenvalues)).real)
  with jax.enable_x64():
    found = 6 * float(causal.acyclicity_penalty(jnp.asarray(graph)))
  assert found == pytest.approx(ours, rel=1e-6)
  assert ours == pytest.approx(notears, rel=1e-2)


def test_nodes_that_are_not_there_do_not_count(rng):
  graph = random_graph(rng, 5, acyclic=False)
  padded = np.zeros((8, 8))
  padded[:5, :5] = graph
  found = causal.acyclicity_penalty(*float32(padded), valid=jnp.arange(8) < 5)
  alone = causal.acyclicity_penalty(*float32(graph))
  np.testing.assert_allclose(found, alone, rtol=1e-6)


def test_influence_counts_paths_of_up_to_three_edges():
  chain = np.diag([0.5, 0.4, 0.3, 0.2], k=1)
  found = np.asarray(causal.transitive_influence(*float32(chain)))
  assert found[0, 1] == pytest.approx(0.5)
  assert found[0, 2] == pytest.approx(0.2)
  assert found[0, 3] == pytest.approx(0.06)
  assert found[0, 4] == 0


def test_the_influence_of_some_is_that_of_the_whole(rng, variant):
  graphs = np.stack([random_graph(rng, 6, acyclic=False) for _ in range(4)])
  graphs = graphs.reshape(2, 2, 6, 6)
  whole = np.asarray(variant(causal.transitive_influence)(*float32(graphs)))
  expected = graphs + graphs @ graphs + graphs @ graphs @ graphs
  np.testing.assert_allclose(whole, expected, atol=1e-6)
  for rows in ([0], [4, 1, 4], list(range(6))):
    found = variant(causal.transitive_influence)(
      *float32(graphs), rows=jnp.asarray(graphs[:, :, rows], jnp.float32)
    )
    np.testing.assert_allclose(found, whole[:, :, rows], atol=1e-6)


def test_an_edge_that_begins_changes_little_and_has_a_finite_gradient():
  scores = jnp.array([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]])

  def next_level(edge):
    graph = jnp.zeros((3, 3)).at[0, 1].set(edge)
    return causal.propagate_causal_graph(scores, graph, 0.5)[0, 1]

  begins = [float(next_level(edge)) for edge in (0.0, 1e-30, 1e-6)]
  np.testing.assert_allclose(begins, begins[0], atol=1e-3)
  for edge in (1e-30, 1e-6):
    assert abs(float(jax.grad(next_level)(edge))) < 1e4
