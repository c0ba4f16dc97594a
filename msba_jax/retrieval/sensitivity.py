"""How much an embedding in the context `batch` depends on its batch.

Attributes:
  batch_sensitivity: the mean distance between embeddings of one image.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msba_jax.data.errors import InputError
from msba_jax.data.source import Source, SubsetSource
from msba_jax.models.context import batch
from msba_jax.retrieval.embed import embed
from msba_jax.retrieval.embedder import Embedder

__all__ = ['batch_sensitivity']


def batch_sensitivity(
  embedder: Embedder,
  source: Source,
  *,
  batches: int = 10,
  batch_size: int = 64,
  images: int = 256,
  seed: int = 0,
  progress: bool = True,
) -> float:
  r"""Mean ‖e(x|B₁) − e(x|B₂)‖: what its company does to an image.

  A random sample of images is divided into batches at random, `batches` times
  over. The mean is over images and over all pairs of divisions. The modes that
  are reported do not depend on the batch; this says how much `batch` does.

  Args:
    embedder: the model.
    source: where the sample comes from.
    batches: how many random batches each image is embedded in.
    batch_size: images of a batch; fewer if the source has not twice as many.
    images: size of the sample, rounded down to whole batches.
    seed: of the sample and its divisions.
    progress: whether a bar is shown.

  Returns:
    The mean distance of unit vectors, from 0 to 2.

  Raises:
    InputError: the source has fewer than four images.
    ValueError: fewer than two batches, or not two images in each.
  """
  if batches < 2 or batch_size < 2:
    raise ValueError(f'{batches=} and {batch_size=} must be at least 2')
  if len(source) < 4:
    raise InputError(
      f'{len(source)} images are too few for different batches: take a split '
      'of at least 4'
    )
  size = min(batch_size, len(source) // 2)
  count = max(min(images, len(source)) // size, 2) * size
  rng = np.random.default_rng(seed)
  sample = rng.choice(len(source), count, replace=False)
  stored = embed(
    embedder,
    SubsetSource(source, sample),
    keep_regions=True,
    progress=progress,
  ).regions
  assert stored is not None
  everyone = batch(jnp.ones(size, jnp.bool_))

  @jax.jit
  def in_batch(variables: Any, regions: jax.Array) -> jax.Array:
    return embedder.model.apply(
      variables,
      jnp.moveaxis(regions.astype(jnp.float32), 0, 1),
      context=everyone,
      method='refine',
    )[0]

  embedded = []
  for _ in range(batches):
    order = rng.permutation(count)
    vectors = [
      np.asarray(in_batch(embedder.variables, stored[rows]))
      for rows in order.reshape(-1, size)
    ]
    embedded.append(np.concatenate(vectors)[np.argsort(order)])
  distances = [
    np.linalg.norm(one - other, axis=1).mean()
    for i, one in enumerate(embedded)
    for other in embedded[:i]
  ]
  return float(np.mean(distances))
