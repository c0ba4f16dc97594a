"""BCP, bidirectional context propagation: regions look at other images.

Attributes:
  BidirectionalContext: the stage.
  ContextKeys: the context as the stage sees it.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msba_jax.layers.attention import weighted_sum
from msba_jax.layers.bidirectional import bidirectional_weights
from msba_jax.layers.heads import head_alignment, select_heads
from msba_jax.layers.interventions import (
  counterfactual_weights,
  permuted_places,
)
from msba_jax.models.blocks import (
  FeedForward,
  KeyProjection,
  small_init,
  split_heads,
)
from msba_jax.models.context import AnyContext, BatchContext, Context, Solo

__all__ = ['BidirectionalContext', 'ContextKeys', 'context_keys']


class ContextKeys(NamedTuple):
  """A context with the images that ask put in their place.

  Attributes:
    asks: whether the asking images are the first n of the context.
    foreign: (l, j, r, d) of images that do not ask, or None.
    mask: (1, m), True takes part.
    bias: (n, m), or (l, n, m) one a level, or None.
  """

  asks: bool
  foreign: Array | None
  mask: Array
  bias: Array | None


def context_keys(context: AnyContext, n: int) -> ContextKeys | None:
  """Translates a context for n asking images; None is solo.

  Raises:
    TypeError: it is no context.
    ValueError: its validity mask is not of n images.
  """
  if isinstance(context, Solo):
    return None
  if isinstance(context, Context):
    return ContextKeys(
      False, context.regions, context.valid[None], context.bias
    )
  if not isinstance(context, BatchContext):
    raise TypeError(
      f'context must be solo, batch(valid) or a Context: {type(context)}'
    )
  if context.valid.shape != (n,):
    raise ValueError(
      f'batch(valid) must hold one entry an image: {context.valid.shape=}, '
      f'{n} images'
    )
  memory = context.memory
  if memory is None:
    return ContextKeys(True, None, context.valid[None], context.bias)
  bias = None
  if context.bias is not None or memory.bias is not None:
    parts = [
      jnp.zeros((n, size)) if part is None else part
      for part, size in (
        (context.bias, n),
        (memory.bias, memory.valid.shape[0]),
      )
    ]
    lead = max((part.shape[:-2] for part in parts), key=len)
    bias = jnp.concatenate(
      [jnp.broadcast_to(part, (*lead, *part.shape[-2:])) for part in parts],
      axis=-1,
    )
  mask = jnp.concatenate([context.valid, memory.valid])[None]
  return ContextKeys(True, memory.regions, mask, bias)


class BidirectionalContext(nn.Module):
  """Pre-norm attention over images, gated in both directions.

  For every level and region separately, with parameters shared over them,

      y = u + g_f · W_f(forward) + g_b · W_b(backward)
      y = y + g_n · FFN(norm(y))

  with g = σ(MLP([u; message])), and g_n = 0 where n may look at nobody,

  so that an image without context keeps its regions exactly.

  Attributes:
    num_heads: number of heads.
    ratio: width of the feed-forward over that of a region.
    keys: makes the module of the keys; None is a plain projection.
    keep_heads: how many heads an image keeps, those which look where the graph
      says it depends on others; None is all.
    reweigh: `(weights, values, mask) → weights` of the forward message, over
      leading axes of levels and regions; None leaves them.
    contrast: weights that say nothing, whose regions are told beside in
      training, where there is a key 'dropout'; None for none.
  """

  num_heads: int = 4
  ratio: int = 4
  keys: KeyProjection | None = None
  keep_heads: int | None = None
  reweigh: nn.Module | None = None
  contrast: Literal['permuted', 'uniform', 'random'] | None = None

  @nn.compact
  def __call__(
    self,
    regions: Float[Array, 'l n r d'],
    context: AnyContext,
    *,
    influence: Float[Array, 'l n m'] | None = None,
    heads: Float[Array, 'n h'] | None = None,
    regate: Callable[[Array], Array] | None = None,
  ) -> tuple[Float[Array, 'l n r d'], dict[str, Array]]:
    """Lets regions look at a context.

    Args:
      regions: of the asking images.
      context: whom they may look at.
      influence: how much image n depends on m, by which heads are chosen.
      heads: factors of the heads that were chosen before.
      regate: factors (n, h) of heads to the regions that messages are added to;
        None takes `regions`.

    Returns:
      Regions of the same shape, and `attention` (l, r, h, n, m); `heads` (n, h)
      where they are chosen, `counterfactual` regions where there is a contrast.
    """
    levels, n, r, features = regions.shape
    keys_of = context_keys(context, n)
    if keys_of is None:
      return regions, {}
    asking = _by_image(regions)
    foreign = None
    if keys_of.foreign is not None:
      foreign = _by_image(keys_of.foreign.astype(regions.dtype))
    norm = nn.LayerNorm(name='norm')
    project = self._queries_keys(features)
    read = nn.Dense(2 * features, name='values')
    q, k = self._heads(project(norm(asking)))
    v, v_back = self._heads(read(norm(asking)))
    if foreign is not None:
      foreign_q, foreign_k = self._heads(project(norm(foreign)))
      foreign_v, foreign_back = self._heads(read(norm(foreign)))
    else:
      foreign_q = foreign_k = foreign_v = foreign_back = None

    def answering(own: Array, other: Array | None) -> Array:
      parts = [own] if keys_of.asks else []
      parts += [other] if other is not None else []
      return jnp.concatenate(parts)

    values, back_values = (
      jnp.swapaxes(answering(*x), 0, 1)
      for x in ((v, foreign_v), (v_back, foreign_back))
    )
    weights, back_weights = bidirectional_weights(
      q,
      answering(k, foreign_k),
      mask=keys_of.mask,
      bias=_of_regions(keys_of.bias, r),
      asking_keys=k,
      foreign_queries=foreign_q,
    )
    if self.reweigh is not None:
      weights = self.reweigh(weights, values, keys_of.mask)
    attention = weights.reshape(levels, r, *weights.shape[1:])
    aux = {'attention': attention}
    looks = jnp.any(keys_of.mask, axis=-1)
    if heads is None and self.keep_heads is not None and influence is not None:
      heads = _chosen(attention, influence, self.keep_heads)
      heads = jnp.where(looks[:, None], heads, 1)
    if heads is not None:
      aux['heads'] = heads
      regions = regions if regate is None else regate(heads)
    finish = self._finish(features, looks)

    def updated(*read: tuple[Array, Array]) -> Array:
      messages = (jnp.swapaxes(weighted_sum(*x), 0, 1) for x in read)
      if heads is not None:
        factors = heads[:, None, :, None].astype(regions.dtype)
        messages = (message * factors for message in messages)
      messages = (x.reshape(asking.shape) for x in messages)
      return _by_level(finish(_by_image(regions), *messages), levels)

    read = (weights, values), (back_weights, back_values)
    if self.contrast is not None and self.has_rng('dropout'):
      key = self.make_rng('dropout')
      aux['counterfactual'] = updated(
        *_contrast(key, read, kind=self.contrast, mask=keys_of.mask)
      )
    return updated(*read), aux

  def _finish(
    self, features: int, looks: Array
  ) -> Callable[[Array, Array, Array], Array]:
    """What adds the messages to regions, with parameters made once."""
    directions = ('forward', 'backward')
    gates = [
      FeedForward(features // 2, features, name=f'gate_{name}')
      for name in directions
    ]
    outs = [
      nn.Dense(
        features, use_bias=False, kernel_init=small_init, name=f'out_{name}'
      )
      for name in directions
    ]
    norm = nn.LayerNorm(name='norm_feed_forward')
    feed_forward = FeedForward(
      self.ratio * features, outer_init=small_init, name='feed_forward'
    )

    def finish(asking: Array, forward: Array, backward: Array) -> Array:
      updated = asking
      for gate, out, message in zip(
        gates, outs, (forward, backward), strict=True
      ):
        opened = gate(jnp.concatenate([asking, message], axis=-1))
        updated = updated + jax.nn.sigmoid(opened) * out(message)
      inner = feed_forward(norm(updated))
      return updated + jnp.where(looks[:, None, None], inner, 0)

    return finish

  def _queries_keys(self, features: int) -> Callable[[Array], Array]:
    """Queries and keys side by side; both are called more than once."""
    if self.keys is None:
      return nn.Dense(2 * features, name='queries_keys')
    ask = nn.Dense(features, name='queries')
    answer = self.keys(features, grid=None, prefix=0, name='keys')
    return lambda x: jnp.concatenate([ask(x), answer(x)], axis=-1)

  def _heads(self, projected: Array) -> list[Array]:
    return [
      split_heads(x, self.num_heads) for x in jnp.split(projected, 2, axis=-1)
    ]


def has_context(context: AnyContext, n: int) -> Bool[Array, ' n']:
  """Whether each of n images may look at anybody."""
  keys_of = context_keys(context, n)
  if keys_of is None:
    return jnp.zeros((n,), jnp.bool_)
  return jnp.broadcast_to(jnp.any(keys_of.mask, axis=-1), (n,))


def _chosen(attention: Array, influence: Array, keep: int) -> Array:
  """Factors (n, h) of the heads that look where an image depends on others."""
  scores = head_alignment(jnp.mean(attention, axis=1), influence)
  return select_heads(jnp.sum(scores, axis=0), keep)


def _contrast(
  key: jax.Array,
  read: Sequence[tuple[Array, Array]],
  *,
  kind: Literal['permuted', 'uniform', 'random'],
  mask: Array,
) -> list[tuple[Array, Array]]:
  """Weights and values of both directions, of which the weights say nothing.

  Values in another order do what weights in another order do, and are fewer.
  """
  if kind == 'permuted':
    order = permuted_places(key, mask.shape[-1], mask=mask)
    return [
      (weights, jnp.take(values, order, axis=1)) for weights, values in read
    ]
  return [
    (counterfactual_weights(key, weights, kind=kind, mask=mask), values)
    for weights, values in read
  ]


def _of_regions(bias: Array | None, r: int) -> Array | None:
  """(l, n, m) to (l · r, 1, n, m): all heads, the regions of each level."""
  if bias is None or bias.ndim == 2:
    return bias
  return jnp.repeat(bias, r, axis=0)[:, None]


def _by_image(regions: Array) -> Array:
  """(l, n, r, d) to (n, l · r, d)."""
  levels, n, r, d = regions.shape
  return jnp.swapaxes(regions, 0, 1).reshape(n, levels * r, d)


def _by_level(regions: Array, levels: int) -> Array:
  """(n, l · r, d) to (l, n, r, d)."""
  n, joint, d = regions.shape
  return jnp.swapaxes(regions.reshape(n, levels, joint // levels, d), 0, 1)
