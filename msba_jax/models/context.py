"""Contexts: whom an image may look at, as a value.

| context | keys come from | single query safe |
|---|---|---|
| `solo` | nothing, the default | yes |
| `batch(valid)` | the other images of the batch, and oneself | no |
| `Context` of neighbours | the k nearest images of a gallery | yes |
| `Context` of a memory | a moving-average bank of regions | yes |

All share the weights of a model; they differ only in what is handed in. A
context is a pytree, so that a compiled function takes it as an argument.

Attributes:
  Solo, solo: no context.
  Context: foreign regions that answer and do not ask.
  BatchContext, batch: the images of the batch, beside them an optional memory.
  map_regions: a context with other regions.
  MemoryBank, create_memory, push_memory: the bank, state in and out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = [
  'AnyContext',
  'BatchContext',
  'Context',
  'MemoryBank',
  'Solo',
  'batch',
  'create_memory',
  'map_regions',
  'push_memory',
  'solo',
]


class Solo(NamedTuple):
  """No context: every image is embedded alone."""


class Context(NamedTuple):
  """Foreign images that answer but do not ask.

  Attributes:
    regions: (l, m, r, d), unprojected, as `out['regions']` of a model.
    valid: (m,), False is padding and has no influence.
    bias: (n, m) added to the scores, or (l, n, m) one a level, or None.
  """

  regions: Array
  valid: Array
  bias: Array | None = None


class BatchContext(NamedTuple):
  """The batch itself; made by `batch`.

  Attributes:
    valid: (n,), whether image n may be looked at.
    memory: foreign images beside it, or None.
    bias: (n, n) or (l, n, n) added to the scores among the batch, or None.
  """

  valid: Array
  memory: Context | None = None
  bias: Array | None = None


AnyContext = Solo | Context | BatchContext
solo = Solo()


def batch(
  valid: Bool[Array, ' n'],
  *,
  memory: 'Context | MemoryBank | None' = None,
  bias: Float[Array, '*l n n'] | None = None,
) -> BatchContext:
  """The images of the batch are the context of each of them.

  An image may look at itself as well, so that a batch of one is defined. With
  every `valid` False, here and in the memory, the result is that of `solo`:
  context dropout switches by these masks, in one trace.

  Args:
    valid: False for padding.
    memory: foreign images to look at beside the batch.
    bias: added to the scores among the batch, of all levels or one a level.

  Returns:
    The context.
  """
  if isinstance(memory, MemoryBank):
    memory = memory.context()
  return BatchContext(valid, memory, bias)


def map_regions(
  function: Callable[[Array], Array], context: AnyContext
) -> AnyContext:
  """Applies a function to the regions of the foreign images of a context."""
  if isinstance(context, Context):
    return context._replace(regions=function(context.regions))
  if isinstance(context, BatchContext) and context.memory is not None:
    return context._replace(memory=map_regions(function, context.memory))
  return context


class MemoryBank(NamedTuple):
  """A bank of regions; every slot is a moving average.

  Attributes:
    regions: (l, m, r, d), one slot for each of m.
    valid: (m,), False while a slot has never been written.
  """

  regions: Array
  valid: Array

  def context(self) -> Context:
    """The bank as a context."""
    return Context(self.regions, self.valid)


def create_memory(
  size: int, *, levels: int, regions: int, features: int
) -> MemoryBank:
  """An empty bank.

  Args:
    size: number of slots.
    levels: pyramid levels of the model.
    regions: regions per level.
    features: width of a region.

  Returns:
    The bank, in which no slot is valid.
  """
  return MemoryBank(
    jnp.zeros((levels, size, regions, features), jnp.float32),
    jnp.zeros((size,), jnp.bool_),
  )


def push_memory(
  bank: MemoryBank,
  regions: Float[Array, 'l n r d'],
  slots: Int[Array, ' n'],
  *,
  valid: Bool[Array, ' n'],
  decay: float = 0.9,
) -> MemoryBank:
  """Moves the slots of these images towards their regions.

  Images of one slot are averaged first; the slot becomes decay · old +
  (1 − decay) · mean. A slot that was empty takes the mean. No gradient enters
  the bank.

  Args:
    bank: the bank before.
    regions: regions of n images, as `out['memory']` of a model.
    slots: the slot of every image: its class in training.
    valid: False for padding, which is not written.
    decay: of the moving average, in [0, 1).

  Returns:
    The bank after.
  """
  size = bank.valid.shape[0]
  regions = jax.lax.stop_gradient(regions).astype(bank.regions.dtype)
  inside = valid & (slots >= 0) & (slots < size)
  member = (
    (slots[None, :] == jnp.arange(size)[:, None]) & inside[None, :]
  ).astype(regions.dtype)
  count = jnp.sum(member, axis=1)
  touched = count > 0
  mean = jnp.einsum('mn,lnrd->lmrd', member, regions)
  mean = mean / jnp.maximum(count, 1)[None, :, None, None]
  kept = jnp.where(bank.valid, decay, 0.0)[None, :, None, None]
  moved = kept * bank.regions + (1 - kept) * mean
  return MemoryBank(
    jnp.where(touched[None, :, None, None], moved, bank.regions),
    bank.valid | touched,
  )
