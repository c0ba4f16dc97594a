r"""The batch graph of MSBA: how much an image looks at another, by content.

Attributes:
  ContentGraph: the stage.
  weigh_context: puts a graph into the bias of a context.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from msba_jax.models.blocks import positive_parameter
from msba_jax.models.context import AnyContext, BatchContext, Context

__all__ = ['ContentGraph', 'weigh_context']

# Finite: an image that is alone still attends to itself.
_OWN = -1e4


class ContentGraph(nn.Module):
  r"""bias[n, m] = s · ⟨e_solo[n], e_solo[m]⟩, with a learned scale s > 0.

  Queries and keys of regions share a large common part and are far from telling
  classes apart before they are trained, so that attention would begin uniform,
  and a message that is the mean of the batch teaches nothing. Solo embeddings
  are what the loss itself shapes. With them the untrained system already is the
  training-free neighbour refinement, and learns from there.

  Attributes:
    scale: s at first.
  """

  scale: float = 20.0

  @nn.compact
  def __call__(
    self, asking: Float[Array, 'n e'], answering: Float[Array, 'm e']
  ) -> tuple[Float[Array, 'n m'], dict[str, Array]]:
    """Returns the bias, and s as auxiliary."""
    scale = positive_parameter(self, 'scale', self.scale)
    products = jnp.einsum('ne,me->nm', asking, answering)
    return scale * products.astype(jnp.float32), {'scale': scale}


def weigh_context(
  context: AnyContext,
  solo: Float[Array, 'n e'],
  *,
  graph: Callable[[Array, Array], tuple[Array, dict[str, Array]]],
  embed: Callable[[Array], Array],
) -> tuple[AnyContext, dict[str, Array]]:
  """Adds a graph to the bias of a context.

  Among the images of a batch an image looks at itself only if it may look at
  nobody else: as in the mode `neighbours`, where it is not its own neighbour.

  Args:
    context: without the graph.
    solo: embeddings of the asking images.
    graph: of two sets of embeddings.
    embed: regions (l, m, r, d) of foreign images to embeddings (m, e).

  Returns:
    The same context with a bias, and what the graph tells of itself.
  """

  def weigh(foreign: Context) -> tuple[Context, dict[str, Array]]:
    bias, aux = graph(solo, embed(foreign.regions))
    return foreign._replace(bias=_sum(foreign.bias, bias)), aux

  if isinstance(context, Context):
    return weigh(context)
  if not isinstance(context, BatchContext):
    return context, {}  # solo, or what the next stage says is no context
  memory = None if context.memory is None else weigh(context.memory)[0]
  bias, aux = graph(solo, solo)
  bias = _sum(context.bias, bias + _OWN * jnp.eye(solo.shape[0]))
  return BatchContext(context.valid, memory, bias), aux


def _sum(bias: Array | None, more: Array) -> Array:
  return more if bias is None else bias + more
