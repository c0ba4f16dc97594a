"""BCP, bidirectional context propagation: regions look at other images.

Attributes:
  BidirectionalContext: the stage.
  ContextKeys: the context as the stage sees it.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msba_jax.layers.in_batch import bidirectional_messages
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
    bias: (n, m) or None.
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
    size = memory.valid.shape[0]
    bias = jnp.concatenate(
      [
        jnp.zeros((n, n)) if context.bias is None else context.bias,
        jnp.zeros((n, size)) if memory.bias is None else memory.bias,
      ],
      axis=1,
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
  """

  num_heads: int = 4
  ratio: int = 4
  keys: KeyProjection | None = None

  @nn.compact
  def __call__(
    self, regions: Float[Array, 'l n r d'], context: AnyContext
  ) -> tuple[Float[Array, 'l n r d'], dict[str, Array]]:
    """Returns regions of the same shape, and the weights (l, r, h, n, m)."""
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

    messages = bidirectional_messages(
      q,
      answering(k, foreign_k),
      answering(v, foreign_v),
      answering(v_back, foreign_back),
      mask=keys_of.mask,
      bias=keys_of.bias,
      asking_keys=k,
      foreign_queries=foreign_q,
    )
    updated = asking
    for name, message in (
      ('forward', messages.forward),
      ('backward', messages.backward),
    ):
      message = message.reshape(asking.shape)
      gate = FeedForward(features // 2, features, name=f'gate_{name}')(
        jnp.concatenate([asking, message], axis=-1)
      )
      sent = nn.Dense(
        features,
        use_bias=False,
        kernel_init=small_init,
        name=f'out_{name}',
      )(message)
      updated = updated + jax.nn.sigmoid(gate) * sent
    has_context = jnp.any(keys_of.mask, axis=-1)[:, None, None]
    inner = FeedForward(
      self.ratio * features, outer_init=small_init, name='feed_forward'
    )(nn.LayerNorm(name='norm_feed_forward')(updated))
    updated = updated + jnp.where(has_context, inner, 0)
    weights = messages.weights.reshape(levels, r, *messages.weights.shape[1:])
    return _by_level(updated, levels), {'attention': weights}

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


def _by_image(regions: Array) -> Array:
  """(l, n, r, d) to (n, l · r, d)."""
  levels, n, r, d = regions.shape
  return jnp.swapaxes(regions, 0, 1).reshape(n, levels * r, d)


def _by_level(regions: Array, levels: int) -> Array:
  """(n, l · r, d) to (l, n, r, d)."""
  n, joint, d = regions.shape
  return jnp.swapaxes(regions.reshape(n, levels, joint // levels, d), 0, 1)
