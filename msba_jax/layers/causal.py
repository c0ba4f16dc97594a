r"""Causal graphs between images.

A graph is over nodes, the images of a batch or an image and its context; edge
(n, m) says that n depends on m. Everything is float32, takes leading batch axes
(levels, asking images), and nodes that are not valid have neither rows nor
columns.

Attributes:
  GateParams: parameters of the directed gate.
  directed_gate: log of the gate, from differences and products of features.
  causal_scores: gated similarities, a stochastic matrix.
  causal_graph: what exceeds a threshold, without self edges.
  propagate_causal_graph: the scores of the next level.
  acyclicity_penalty: zero exactly on acyclic graphs.
  transitive_influence: along paths of one, two and three edges.
  leave_one_out_effect, intervention_effect, counterfactual_attention: what an
    image would lose without another, of `interventions`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msba_jax.layers.attention import attention_weights
from msba_jax.layers.interventions import (
  counterfactual_attention,
  intervention_effect,
  leave_one_out_effect,
  renormalized,
)

__all__ = [
  'GateParams',
  'acyclicity_penalty',
  'causal_graph',
  'causal_scores',
  'counterfactual_attention',
  'directed_gate',
  'intervention_effect',
  'leave_one_out_effect',
  'propagate_causal_graph',
  'transitive_influence',
]


class GateParams(NamedTuple):
  """Parameters of the directed gate: one hidden layer with GELU.

  Attributes:
    difference: (d, e), reads the signed difference, which has the direction.
    distance: (d, e), reads its absolute value.
    product: (d, e), reads the product.
    bias: (e,) of the hidden layer.
    out: (e,) from the hidden layer to the logit.
    out_bias: () of the logit.
  """

  difference: Array
  distance: Array
  product: Array
  bias: Array
  out: Array
  out_bias: Array


def directed_gate(
  asking: Float[Array, '*b n d'],
  answering: Float[Array, '*b m d'],
  params: GateParams,
) -> Float[Array, '*b n m']:
  r"""Log of the gate: log σ(f([F_n − F_m, |F_n − F_m|, F_n ∘ F_m])).

  The signed difference is what makes it directed: without it f(n, m) = f(m, n).
  Its part of the first layer is the difference of two projections and that of
  the product a matrix product, so that only distances are kept for pairs.

  Args:
    asking: features of the images that may depend on others.
    answering: features of those they may depend on.
    params: of f.

  Returns:
    Numbers ≤ 0, to be added to the scores.
  """
  asking, answering = (x.astype(jnp.float32) for x in (asking, answering))
  return jax.nn.log_sigmoid(_pair_logits(asking, answering, params))


def causal_scores(
  queries: Float[Array, '*b n d'],
  keys: Float[Array, '*b m d'],
  log_gate: Float[Array, '*b n m'],
  *,
  mask: Bool[Array, '...'] | None = None,
) -> Float[Array, '*b n m']:
  r"""C = softmax_m(q_n·k_m/√d + log gate_nm).

  A gate multiplied into the scores would hardly suppress anything: a score of
  zero is as good as its neighbours.

  Args:
    queries: of the images that depend.
    keys: of those they depend on.
    log_gate: as `directed_gate` gives it.
    mask: broadcasts to (*b, n, m); True takes part.

  Returns:
    Rows that sum to one, or to zero where nothing takes part.
  """
  if mask is not None:
    mask = jnp.expand_dims(jnp.broadcast_to(mask, log_gate.shape), -3)
  return attention_weights(
    queries[..., :, None, :],
    keys[..., :, None, :],
    mask=mask,
    bias=jnp.expand_dims(log_gate, -3),
  )[..., 0, :, :]


def causal_graph(
  scores: Float[Array, '*b n n'],
  threshold: Float[Array, '...'] | float,
  *,
  valid: Bool[Array, '*#b n'] | None = None,
) -> Float[Array, '*b n n']:
  r"""W_nm = relu(C_nm − κ / n) without self edges, n the number of valid nodes.

  Args:
    scores: as `causal_scores` gives them.
    threshold: κ, of a uniform row's entries; broadcasts to the leading axes.
    valid: which nodes there are; None is all.

  Returns:
    Weights of edges; every row sums to less than one if κ > 0.
  """
  pairs, count = _pairs(scores, valid)
  least = jnp.broadcast_to(threshold, count.shape) / jnp.maximum(count, 1)
  edges = jax.nn.relu(scores - least[..., None, None])
  off = ~jnp.eye(scores.shape[-1], dtype=jnp.bool_)
  return jnp.where(pairs & jnp.broadcast_to(off, pairs.shape), edges, 0)


def propagate_causal_graph(
  scores: Float[Array, '*b n n'],
  graph: Float[Array, '*b n n'],
  mix: Float[Array, '...'] | float,
  *,
  valid: Bool[Array, '*#b n'] | None = None,
) -> Float[Array, '*b n n']:
  r"""Scores of the next level: C' = α C + (1 − α) Ŵ C.

  Ŵ is the graph with rows that sum to one. A node without edges keeps its own
  row, and one whose edges sum to less than 1e-3 a part of it, so that nothing
  jumps where an edge begins and gradients stay finite.

  Args:
    scores: C of this level.
    graph: W of this level.
    mix: α in [0, 1]; broadcasts to the leading axes.
    valid: which nodes there are; None is all.

  Returns:
    Rows that sum to one, or to zero for a node that is not there.
  """
  pairs, _ = _pairs(scores, valid)
  normal = renormalized(graph)
  rest = jnp.maximum(1 - jnp.sum(normal, axis=-1, keepdims=True), 0)
  own = jnp.broadcast_to(jnp.eye(scores.shape[-1]), graph.shape)
  normal = normal + rest * own
  alpha = jnp.broadcast_to(mix, scores.shape[:-2])[..., None, None]
  mixed = alpha * scores + (1 - alpha) * (normal @ scores)
  return renormalized(jnp.where(pairs, mixed, 0))


def acyclicity_penalty(
  graph: Float[Array, '*b n n'],
  *,
  valid: Bool[Array, '*#b n'] | None = None,
) -> Float[Array, '*b']:
  r"""−log det(I − W) / n: zero exactly where W has no cycle, else positive.

  W ≥ 0 with a zero diagonal and rows that sum to less than one, as
  `causal_graph` gives it.

  Args:
    graph: weights of edges.
    valid: which nodes there are, n of them; None is all.

  Returns:
    One number a graph.

  Source: DAGMA (2022), arXiv 2209.08037, with s = 1 and W itself in place of
  its squares, as W is not negative.
  """
  _, count = _pairs(graph, valid)
  size = graph.shape[-1]
  identity = jnp.broadcast_to(jnp.eye(size), graph.shape)
  log_determinant = jnp.linalg.slogdet(identity - graph)[1]
  return -log_determinant / jnp.maximum(count, 1)


def transitive_influence(
  graph: Float[Array, '*b n n'],
  *,
  rows: Float[Array, '*b m n'] | None = None,
) -> Float[Array, '*b m n']:
  """G = W + W² + W³: along paths of one, two and three edges.

  Args:
    graph: W.
    rows: those of W whose influence is wanted; None is all, which costs more.

  Returns:
    The rows of G.
  """
  rows = graph if rows is None else rows
  two = rows @ graph
  return rows + two + two @ graph


@jax.checkpoint
def _pair_logits(asking: Array, answering: Array, params: GateParams) -> Array:
  """Logits of all pairs, whose hidden layers are made again in the gradient."""
  apart = jnp.abs(asking[..., :, None, :] - answering[..., None, :, :])
  hidden = (
    (asking @ params.difference)[..., :, None, :]
    - (answering @ params.difference)[..., None, :, :]
    + apart @ params.distance
    # One matrix product for each hidden unit, and no tensor of products.
    + jnp.einsum('...nhe,...me->...nmh', _scaled(asking, params), answering)
  )
  bias = params.bias.reshape((1,) * (hidden.ndim - 1) + (-1,))
  return jax.nn.gelu(hidden + bias) @ params.out + params.out_bias


def _scaled(features: Array, params: GateParams) -> Array:
  """Features times the weights of the product: (*b, n, e, d)."""
  return features[..., None, :] * params.product.T.reshape(
    (1,) * (features.ndim - 1) + params.product.T.shape
  )


def _pairs(square: Array, valid: Array | None) -> tuple[Array, Array]:
  """Which pairs are of two nodes, and how many nodes there are, (*b,)."""
  if valid is None:
    valid = jnp.ones(square.shape[-1], jnp.bool_)
  valid = jnp.broadcast_to(valid, square.shape[:-1])
  pairs = valid[..., :, None] & valid[..., None, :]
  return pairs, jnp.sum(valid, axis=-1).astype(jnp.float32)
