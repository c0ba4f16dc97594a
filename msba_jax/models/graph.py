r"""The batch graph of MSBA: how much an image looks at another, by content.

A graph is called as `graph(context, solo, levels=…, embed=…)`; it returns the
same context with a bias, and what later stages may want to know of it.

Attributes:
  ContentGraph: the stage.
  content_bias: scaled cosines, which other graphs begin with too.
  OWN: bias of an image towards itself.
  add_bias: the sum of two biases, of which one may be None.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.models.blocks import positive_parameter
from msba_jax.models.context import AnyContext, BatchContext, Context

__all__ = ['OWN', 'ContentGraph', 'add_bias', 'content_bias']

# Finite: an image that is alone still attends to itself.
OWN = -1e4


class ContentGraph(nn.Module):
  r"""bias[n, m] = s · ⟨e_solo[n], e_solo[m]⟩, with a learned scale s > 0.

  Queries and keys of regions share a large common part and are far from telling
  classes apart before they are trained, so that attention would begin uniform,
  and a message that is the mean of the batch teaches nothing. Solo embeddings
  are what the loss itself shapes. With them the untrained system already is the
  training-free neighbour refinement, and learns from there.

  Among the images of a batch an image looks at itself only if it may look at
  nobody else: as in the mode `neighbours`, where it is not its own neighbour.

  Attributes:
    scale: s at first.
  """

  scale: float = 20.0

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
      levels: of the pyramid, which share the bias.
      embed: regions (l, m, r, d) of foreign images to embeddings (m, e).

    Returns:
      The same context with a bias, and s as auxiliary.
    """
    del levels
    scale = positive_parameter(self, 'scale', self.scale)

    def foreign(context: Context) -> Context:
      bias = content_bias(scale, solo, embed(context.regions))
      return context._replace(bias=add_bias(context.bias, bias))

    aux = {'scale': scale}
    if isinstance(context, Context):
      return foreign(context), aux
    if not isinstance(context, BatchContext):
      return context, {}  # solo, or what the next stage says is no context
    bias = content_bias(scale, solo, solo) + OWN * jnp.eye(solo.shape[0])
    memory = None if context.memory is None else foreign(context.memory)
    return BatchContext(
      context.valid, memory, add_bias(context.bias, bias)
    ), aux


def content_bias(
  scale: Float[Array, ''],
  asking: Float[Array, '*b n e'],
  answering: Float[Array, '*b m e'],
) -> Float[Array, '*b n m']:
  """Scaled cosines of unit vectors, float32."""
  products = jnp.einsum('...ne,...me->...nm', asking, answering)
  return scale * products.astype(jnp.float32)


def add_bias(bias: Array | None, more: Array) -> Array:
  """A bias of all levels, or of each, and another."""
  if bias is None:
    return more
  rank = max(bias.ndim, more.ndim)
  bias, more = (
    x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (bias, more)
  )
  return bias + more
