r"""The batch graph of CASTLE: on whom an image depends, level by level.

Nodes are the valid images of the batch; with a memory or neighbours, the asking
image and its own context, a square graph for each asking image, so that those
who ask together do not meet.

Attributes:
  CausalGraph: the stage.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.layers.causal import (
  GateParams,
  acyclicity_penalty,
  causal_graph,
  causal_scores,
  directed_gate,
  propagate_causal_graph,
  transitive_influence,
)
from msba_jax.models.blocks import positive_parameter, small_init
from msba_jax.models.context import AnyContext, BatchContext, Context
from msba_jax.models.graph import OWN, add_bias, content_bias

__all__ = ['CausalGraph']

_FLOOR = 1e-6


class Told(NamedTuple):
  """What a graph says of the asking images.

  Attributes:
    scores: C, (l, n, m) over the keys of the context.
    influence: G, likewise.
    dependents: (l, n), how much the other nodes depend on an image.
    acyclicity: sum of the penalty over levels, the mean over graphs.
    edges: Σ|W| / n, likewise.
  """

  scores: Array
  influence: Array
  dependents: Array
  acyclicity: Array
  edges: Array


class Weights(NamedTuple):
  """Parameters of the graph, made once and used for every set of nodes.

  Attributes:
    features: solo embeddings to queries, keys and what the gate reads.
    gate: of the directed gate, or None.
    scale: of the cosines.
    thresholds: κ (l,).
    mixes: α (l − 1,).
  """

  features: Callable[[Array], tuple[Array, Array, Array]]
  gate: GateParams | None
  scale: Array
  thresholds: Array
  mixes: Array


class CausalGraph(nn.Module):
  r"""C⁰ = softmax_m(q·k/√d + s ⟨e_n, e_m⟩ + log gate), then level by level.

      W^l = relu(C^l − κ^l / n),  C^{l+1} = α^l C^l + (1 − α^l) Ŵ^l C^l

  F, which queries, keys and the gate read, are the solo embeddings at unit
  variance. Attention of level l gets the bias log max(C^l, 1e-6). The content
  term is that of `models.graph.ContentGraph`, for the reason given there. Where
  the batch and a memory are there at once, which no training step draws, the
  graph is that of the batch and the memory has the least score.

  Attributes:
    width: of queries, keys, and of what the gate reads.
    hidden: width of the gate's hidden layer.
    scale: s at first.
    gated: whether there is a gate.
    most: nodes of a square graph beside the asking image: of a larger memory
      those with the largest cosine; the others keep the least score. The work
      grows with the square of it.
  """

  width: int = 64
  hidden: int = 32
  scale: float = 20.0
  gated: bool = True
  most: int = 32

  @nn.compact
  def __call__(
    self,
    context: AnyContext,
    solo: Float[Array, 'n e'],
    *,
    levels: int,
    embed: Callable[[Array], Array],
  ) -> tuple[AnyContext, dict[str, Array]]:
    """Adds the graph to the bias of a context.

    Args:
      context: without the graph.
      solo: embeddings of the asking images.
      levels: of the pyramid.
      embed: regions (l, m, r, d) of foreign images to embeddings (m, e).

    Returns:
      The same context with a bias (l, n, m) instead of its own, which the
      scores hold; and `scores`, `influence`, `dependents`, `acyclicity` and
      `edges`, see `Told`; for a batch without memory also `graph` (l, n, n).
    """
    weights = self._weights(solo.shape[-1], levels)
    if isinstance(context, Context):
      told = _of_each(weights, solo, embed(context.regions), context, self.most)
      return context._replace(bias=_log(told.scores)), told._asdict()
    if not isinstance(context, BatchContext):
      return context, {}  # solo, or what the next stage says is no context
    n = solo.shape[0]
    own = OWN * jnp.eye(n)
    if context.memory is None:
      told, graph = _of_batch(weights, solo, context)
      bias = add_bias(own, _log(told.scores))
      aux = told._asdict() | {'graph': graph}
      return BatchContext(context.valid, None, bias), aux
    memory, foreign = context.memory, embed(context.memory.regions)

    def both(told: Told, before: int, after: int) -> Told:
      scores, influence = (
        jnp.pad(x, ((0, 0), (0, 0), (before, after)))
        for x in (told.scores, told.influence)
      )
      return told._replace(scores=scores, influence=influence)

    size = foreign.shape[0]
    told = jax.lax.cond(
      jnp.any(context.valid),
      lambda: both(_of_batch(weights, solo, context)[0], 0, size),
      lambda: both(_of_each(weights, solo, foreign, memory, self.most), n, 0),
    )
    bias = _log(told.scores)
    memory = memory._replace(bias=bias[..., n:])
    bias = add_bias(own, bias[..., :n])
    return BatchContext(context.valid, memory, bias), told._asdict()

  def _weights(self, features: int, levels: int) -> Weights:
    """Makes the parameters."""
    queries, keys = (
      nn.Dense(self.width, use_bias=False, name=name)
      for name in ('queries', 'keys')
    )
    gate, reads = None, None
    if self.gated:
      reads = nn.Dense(self.width, use_bias=False, name='gate')
      pairs = {
        name: self.param(
          f'gate_{name}',
          nn.initializers.lecun_normal(),
          (self.width, self.hidden),
        )
        for name in ('difference', 'distance', 'product')
      }
      zeros = nn.initializers.zeros
      gate = GateParams(
        **pairs,
        bias=self.param('gate_bias', zeros, (self.hidden,)),
        out=self.param('gate_out', small_init, (self.hidden, 1))[:, 0],
        out_bias=self.param('gate_out_bias', zeros, ()),
      )
    threshold = self.param(
      'thresholds', nn.initializers.constant(math.log(3 / 5)), (levels,)
    )
    mix = jnp.zeros(0)
    if levels > 1:
      mix = self.param('mixes', nn.initializers.zeros, (levels - 1,))

    def read(solo: Array) -> tuple[Array, Array, Array]:
      solo = solo * math.sqrt(features)
      return queries(solo), keys(solo), solo if reads is None else reads(solo)

    return Weights(
      read,
      gate,
      positive_parameter(self, 'scale', self.scale),
      0.05 + 2 * jax.nn.sigmoid(threshold),
      jax.nn.sigmoid(mix),
    )


def _of_batch(
  weights: Weights, solo: Array, context: BatchContext
) -> tuple[Told, Array]:
  """The images of a batch as nodes; also W (l, n, n)."""
  prior = _prior(weights, solo, solo, context.bias)
  queries, keys, read = weights.features(solo)
  if weights.gate is not None:
    prior = prior + directed_gate(read, read, weights.gate)
  scores, graphs = _levels(
    weights.thresholds, weights.mixes, queries, keys, prior, context.valid
  )
  told = Told(
    scores,
    transitive_influence(graphs),
    jnp.sum(graphs, axis=-2),
    *_penalties(graphs, context.valid),
  )
  return told, graphs


def _of_each(
  weights: Weights, solo: Array, foreign: Array, context: Context, most: int
) -> Told:
  """Each asking image and its context as nodes, the asking image first."""
  n, m = solo.shape[0], foreign.shape[0]
  content = _prior(weights, solo, foreign, context.bias)
  valid = jnp.broadcast_to(context.valid, (n, m))
  near = None
  if m > most:
    near = jax.lax.top_k(jnp.where(valid, content, -jnp.inf), most)[1]
    valid = jnp.take_along_axis(valid, near, axis=1)
    content = jnp.take_along_axis(content, near, axis=1)

  def nodes(own: Array, other: Array) -> Array:
    of_each = (
      jnp.broadcast_to(other, (n, *other.shape))
      if near is None
      else other[near]
    )
    return jnp.concatenate([own[:, None], of_each], axis=1)

  own, other = weights.features(solo), weights.features(foreign)
  queries, keys = nodes(own[0], other[0]), nodes(own[1], other[1])
  vectors = nodes(solo, foreign)
  among = content_bias(weights.scale, vectors, vectors)
  among = among.at[:, 0, 1:].set(content)
  if weights.gate is not None:
    if near is None or (n + m) ** 2 < n * (1 + most) ** 2:
      gate = _shared_gate(weights.gate, own[2], other[2], near)
    else:
      read = nodes(own[2], other[2])
      gate = directed_gate(read, read, weights.gate)
    among = among + gate
  valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
  scores, graphs = _levels(
    weights.thresholds, weights.mixes, queries, keys, among, valid
  )

  def by_key(rows: Array) -> Array:
    """(l, n, 1 + k) of the nodes to (l, n, m) of the context."""
    if near is None:
      return rows[..., 1:]
    spread = jnp.zeros((*rows.shape[:2], m), rows.dtype)
    image = jnp.arange(n)[:, None]
    return spread.at[:, image, near].set(rows[..., 1:])

  influence = transitive_influence(graphs, rows=graphs[..., :1, :])
  return Told(
    by_key(scores[..., 0, :]),
    by_key(influence[..., 0, :]),
    jnp.sum(graphs[..., 0], axis=-1),
    *_penalties(graphs, valid),
  )


def _shared_gate(
  gate: GateParams, own: Array, other: Array, near: Array | None
) -> Array:
  """The gate of each square graph, (n, 1 + k, 1 + k).

  Pairs of foreign images are those of all asking images: each is made once.
  """
  row = directed_gate(own, other, gate)
  column = directed_gate(other, own, gate).T
  inner = directed_gate(other, other, gate)
  if near is None:
    inner = jnp.broadcast_to(inner, (len(own), *inner.shape))
  else:
    row, column = (jnp.take_along_axis(x, near, axis=1) for x in (row, column))
    inner = inner[near[:, :, None], near[:, None, :]]
  top = jnp.pad(row, ((0, 0), (1, 0)))[:, None]
  rest = jnp.concatenate([column[:, :, None], inner], axis=2)
  return jnp.concatenate([top, rest], axis=1)


@jax.checkpoint
def _levels(
  thresholds: Array,
  mixes: Array,
  queries: Array,
  keys: Array,
  prior: Array,
  valid: Array,
) -> tuple[Array, Array]:
  """C and W of all levels, (l, *b, n, n), of nodes (*b, n).

  What lies between them is made again in the gradient.
  """
  pairs = valid[..., :, None] & valid[..., None, :]
  # A node looks at itself only if there is nobody else.
  prior = prior + jnp.broadcast_to(OWN * jnp.eye(prior.shape[-1]), prior.shape)
  scores = [causal_scores(queries, keys, prior, mask=pairs)]
  graphs = []
  for level, threshold in enumerate(thresholds):
    graphs.append(causal_graph(scores[-1], threshold, valid=valid))
    if level < len(mixes):
      scores.append(
        propagate_causal_graph(
          scores[-1], graphs[-1], mixes[level], valid=valid
        )
      )
  return jnp.stack(scores), jnp.stack(graphs)


def _penalties(graphs: Array, valid: Array) -> tuple[Array, Array]:
  """Acyclicity and Σ|W| / n: summed over levels, the mean over graphs."""
  count = jnp.maximum(jnp.sum(valid, axis=-1), 1)
  edges = jnp.sum(graphs, axis=(-2, -1)) / jnp.broadcast_to(
    count, graphs.shape[:-2]
  )
  cycles = acyclicity_penalty(graphs, valid=valid)
  cycles, edges = (jnp.sum(x, axis=0) for x in (cycles, edges))
  return jnp.mean(cycles), jnp.mean(edges)


def _prior(
  weights: Weights, asking: Array, answering: Array, bias: Array | None
) -> Array:
  """Content, and a bias that was in the context before, (n, m)."""
  if bias is not None and bias.ndim != 2:
    raise ValueError(
      'the causal graph takes a bias (n, m) for all levels, not one a level: '
      f'{bias.shape=}'
    )
  return add_bias(bias, content_bias(weights.scale, asking, answering))


def _log(scores: Array) -> Array:
  """A bias that leaves softmax(bias) = scores, and nobody out for ever."""
  return jnp.log(jnp.maximum(scores, _FLOOR))
