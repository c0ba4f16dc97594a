r"""Attention between the images of a batch, region by region.

The r-th regions of all images meet: attention runs over the image axis, with
parameters shared over regions.

Attributes:
  attend_across_images: what every image reads from the others.
  attend_joint_tokens: every token over all tokens of the images it may see.
  Messages, bidirectional_messages: both directions, of `bidirectional`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msba_jax.layers.attention import attend
from msba_jax.layers.bidirectional import Messages, bidirectional_messages
from msba_jax.layers.chunked import attend_in_chunks
from msba_jax.layers.implementations import (
  Implementation,
  resolve_implementation,
)

__all__ = [
  'Messages',
  'attend_across_images',
  'attend_joint_tokens',
  'bidirectional_messages',
]


def attend_across_images(
  queries: Float[Array, 'n r h d'],
  keys: Float[Array, 'm r h d'],
  values: Float[Array, 'm r h f'],
  *,
  mask: Bool[Array, '#n #m'] | None = None,
  bias: Float[Array, '#n #m'] | None = None,
  scale: float | None = None,
  precision: jax.lax.PrecisionLike = None,
  implementation: Implementation | None = None,
  chunk: int | tuple[int, int] | None = None,
) -> Float[Array, 'n r h f']:
  r"""Attention over images: o[n,r] = Σ_m softmax_m(q[n,r]·k[m,r]/√d) v[m,r].

  Args:
    queries: regions of the asking images.
    keys: regions of the answering images.
    values: what is read from them.
    mask: True where n may look at m; broadcasts.
    bias: added to the scores of all heads and regions; broadcasts.
    scale: factor of the products; None is 1/√d.
    precision: of the matrix products, as in `jax.lax.dot_general`.
    implementation: as in `attend`.
    chunk: as in `attend`.

  Returns:
    Messages in the dtype of the values; zero for an image that may look at
    nobody.

  Raises:
    ValueError: the shapes do not fit together.
    TypeError: the mask is not Boolean.

  Example:
    >>> regions = jnp.array([[[[1.0]]], [[[3.0]]]])
    >>> mask = ~jnp.eye(2, dtype=bool)
    >>> read = attend_across_images(regions, regions, regions, mask=mask)
    >>> read.ravel().tolist()
    [3.0, 1.0]
  """
  message = attend(
    jnp.swapaxes(queries, 0, 1),
    jnp.swapaxes(keys, 0, 1),
    jnp.swapaxes(values, 0, 1),
    mask=mask,
    bias=bias,
    scale=scale,
    precision=precision,
    implementation=implementation,
    chunk=chunk,
  )
  return jnp.swapaxes(message, 0, 1)


def attend_joint_tokens(
  queries: Float[Array, 'n t h d'],
  keys: Float[Array, 'm s h d'],
  values: Float[Array, 'm s h f'],
  *,
  image_mask: Bool[Array, '#n #m'] | None = None,
  scale: float | None = None,
  precision: jax.lax.PrecisionLike = None,
  implementation: Implementation | None = None,
  chunk: int | tuple[int, int] | None = None,
) -> Float[Array, 'n t h f']:
  r"""Every token of an image looks at every token of the images it may see.

  o[n,t] = Σ_{m,s} softmax_{m,s}(scale · q[n,t]·k[m,s]) v[m,s] over the images m
  with image_mask[n,m]: one softmax over all of their tokens. The mask of tokens
  is never made: a chunk holds whole images.

  Args:
    queries: tokens of the asking images.
    keys: tokens of the answering images.
    values: what is read from them.
    image_mask: True where image n may look at image m; broadcasts.
    scale: factor of the products; None is 1/√d.
    precision: of the matrix products, as in `jax.lax.dot_general`.
    implementation: as in `attend`; 'dense' makes the mask of tokens.
    chunk: largest number of tokens of a chunk, as in `attend`; an image is
      never divided, so a chunk holds at least one.

  Returns:
    Messages in the dtype of the values; zero for an image that may look at
    nobody.

  Raises:
    ValueError: the shapes do not fit together.
    TypeError: the mask is not Boolean.

  Example:
    >>> tokens = jnp.arange(4.0).reshape(2, 2, 1, 1)
    >>> own = jnp.eye(2, dtype=bool)
    >>> read = attend_joint_tokens(0 * tokens, tokens, tokens, image_mask=own)
    >>> read.ravel().tolist()
    [0.5, 0.5, 2.5, 2.5]
  """
  n, t = queries.shape[:2]
  m, s = keys.shape[:2]
  if image_mask is not None:
    if image_mask.dtype != jnp.bool_:
      raise TypeError(
        f'image_mask must be Boolean, True takes part: {image_mask.dtype=}'
      )
    if image_mask.ndim != 2 or any(
      size not in (1, goal)
      for size, goal in zip(image_mask.shape, (n, m), strict=True)
    ):
      raise ValueError(
        f'image_mask must broadcast to (n, m) = {(n, m)}: {image_mask.shape=}'
      )
  queries, keys, values = (
    x.reshape(-1, *x.shape[2:]) for x in (queries, keys, values)
  )
  # Resolved with the mask of images, which has the rank of that of tokens.
  chosen = resolve_implementation(
    implementation, chunk, queries, keys, values, mask=image_mask, bias=None
  )
  if image_mask is None or chosen != 'chunked':
    mask = image_mask
    if mask is not None:
      rows, columns = (
        1 if size == 1 else repeats
        for size, repeats in zip(mask.shape, (t, s), strict=True)
      )
      mask = jnp.repeat(jnp.repeat(mask, rows, axis=0), columns, axis=1)
    message = attend(
      queries,
      keys,
      values,
      mask=mask,
      scale=scale,
      precision=precision,
      implementation=chosen,
      chunk=chunk,
    )
  else:
    message = attend_in_chunks(
      queries,
      keys,
      values,
      mask=image_mask,
      scale=1 / math.sqrt(queries.shape[-1]) if scale is None else scale,
      precision=precision,
      chunk=chunk,
      tile=(t, s),
    ).messages
  return message.reshape(n, t, *message.shape[1:])
