"""A model that is ready to embed images, and its compiled functions.

Attributes:
  Embedder: a model with its parameters and normalisation.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from msba_jax.data.transforms import normalize_image
from msba_jax.models.context import Context
from msba_jax.retrieval.fingerprint import model_fingerprint

__all__ = ['Embedder']


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
  """A model that is ready to embed images.

  Attributes:
    model: follows the interface of `msba_jax.models.msba.MSBA`.
    params: its parameters.
    mean: subtracted from the channels, in units of [0, 1].
    std: what the channels are then divided by.
    statistics: what the model carries beside them, collections by name.
  """

  model: nn.Module
  params: Any
  mean: tuple[float, ...]
  std: tuple[float, ...]
  statistics: Any = dataclasses.field(default_factory=dict)

  @property
  def variables(self) -> Any:
    """Parameters and statistics, as the compiled functions take them."""
    return {'params': self.params, **self.statistics}

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 over model, parameters, normalisation and statistics."""
    facts = [self.statistics] if self.statistics else []
    return model_fingerprint(
      self.model, self.params, tuple(self.mean), tuple(self.std), *facts
    )

  def apply(self, variables: Any, images: Any, context: Any) -> Any:
    """The model on images as a source gives them, to be compiled by others."""
    return self.model.apply(
      variables,
      jax.tree.map(self._normalize, images),
      context=context,
      train=False,
    )

  @functools.cached_property
  def compiled(self) -> Any:
    """`(variables, images, context, keep_regions) → (vectors, regions)`.

    Regions are None unless kept. Compiled once per batch shape and kind of
    context.
    """

    def run(
      variables: Any, images: Any, context: Any, keep_regions: bool
    ) -> Any:
      embeddings, out = self.apply(variables, images, context)
      if not keep_regions:
        return embeddings, None
      regions: Any = out['regions']  # (l, n, r, d)
      return embeddings, jnp.moveaxis(regions, 0, 1).astype(jnp.float16)

    return jax.jit(run, static_argnames='keep_regions')

  @functools.cached_property
  def refine(self) -> Any:
    """`(variables, regions, neighbours, valid)` → vectors (b, e).

    Regions (b, l, r, d) of images with their own context each: neighbours
    (b, k, l, r, d), of which the first are valid (k,).
    """

    def run(
      variables: Any,
      regions: jax.Array,
      neighbours: jax.Array,
      valid: jax.Array,
    ) -> jax.Array:
      def one(regions: jax.Array, neighbours: jax.Array) -> jax.Array:
        embeddings, _ = self.model.apply(
          variables,
          regions.astype(jnp.float32)[:, None],
          context=Context(
            jnp.moveaxis(neighbours.astype(jnp.float32), 0, 1), valid, None
          ),
          method='refine',
        )
        return embeddings[0]

      return jax.vmap(one)(regions, neighbours)

    return jax.jit(run)

  def with_params(self, params: Any, statistics: Any) -> 'Embedder':
    """The same model with other numbers; nothing is compiled anew."""
    other = dataclasses.replace(self, params=params, statistics=statistics)
    vars(other).update(compiled=self.compiled, refine=self.refine)
    return other

  def _normalize(self, images: jax.Array) -> jax.Array:
    # Features of a frozen backbone are no pixels and stay as they are.
    if images.dtype != jnp.uint8:
      return images
    return normalize_image(images, mean=self.mean, std=self.std)
