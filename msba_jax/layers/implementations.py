r"""Which implementation of attention runs, and those that a platform brings.

The choice depends on static facts alone: the platform, the shapes, the dtypes,
and whether there is a mask or a bias. It can be overruled by name.

Attributes:
  Implementation: the names.
  choose_implementation: the choice of `attend`.
  resolve_implementation: the one that was named, or the choice.
  cudnn_attention: cuDNN, on NVIDIA GPUs.
  splash_attention: the block-wise Pallas kernel of JAX, on TPUs.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

__all__ = [
  'Implementation',
  'choose_implementation',
  'cudnn_attention',
  'resolve_implementation',
  'splash_attention',
]

Implementation = Literal['dense', 'chunked', 'cudnn', 'splash']

# Only shape and dtype of such arguments matter.
Described = Array | jax.ShapeDtypeStruct

# Scores of one head from which the loop over chunks is ahead of one product;
# below, heads that run one after the other cost more than the scores' memory.
CHUNKED_SCORES = 512 * 512
SPLASH_LANES = 128


def choose_implementation(
  queries: Described,
  keys: Described,
  values: Described,
  *,
  mask: Described | None = None,
  bias: Described | None = None,
  platform: str | None = None,
) -> Implementation:
  """The implementation that `attend` takes when none is named.

  Args:
    queries: (*b, n, h, d), or its description.
    keys: (*b, m, h, d).
    values: (*b, m, h, f).
    mask: of the call.
    bias: of the call.
    platform: 'cpu', 'gpu' or 'tpu'; None is the default one of JAX.

  Returns:
    A name of `Implementation`.
  """
  platform = platform or jax.default_backend()
  plain = mask is None and bias is None
  scores = queries.shape[-3] * keys.shape[-3]
  if plain and scores >= CHUNKED_SCORES:
    if platform == 'gpu' and cudnn_refusal(queries, keys, values) is None:
      return 'cudnn'
    if platform == 'tpu' and splash_refusal(queries, keys, values) is None:
      return 'splash'
  return 'chunked' if scores >= CHUNKED_SCORES else 'dense'


def resolve_implementation(
  implementation: Implementation | None,
  chunk: int | tuple[int, int] | None,
  queries: Described,
  keys: Described,
  values: Described,
  *,
  mask: Described | None,
  bias: Described | None,
) -> Implementation:
  """The implementation that was named, or implied by a chunk, or chosen.

  Raises:
    ValueError: the name is none, contradicts the chunk, or takes no mask.
  """
  if implementation not in (None, *get_args(Implementation)):
    raise ValueError(
      f'{implementation=} must be one of {get_args(Implementation)} or None'
    )
  if chunk is not None and implementation not in (None, 'chunked'):
    raise ValueError(f"{chunk=} belongs to 'chunked', not {implementation=}")
  if implementation == 'splash' and (mask is not None or bias is not None):
    raise ValueError("implementation='splash' takes neither mask nor bias")
  if 0 in (queries.shape[-3], keys.shape[-3]):
    return 'dense'
  if chunk is not None:
    return 'chunked'
  return implementation or choose_implementation(
    queries, keys, values, mask=mask, bias=bias
  )


def cudnn_refusal(
  queries: Described, keys: Described, values: Described
) -> str | None:
  """Why cuDNN does not take these arrays, or None."""
  dtypes = {x.dtype for x in (queries, keys, values)}
  if len(dtypes) > 1 or dtypes - {jnp.dtype('bfloat16'), jnp.dtype('float16')}:
    names = ', '.join(sorted(str(x) for x in dtypes))
    return f'cuDNN takes bfloat16 or float16, not {names}'
  size = queries.shape[-1]
  if size != values.shape[-1] or size % 8 or size > 128:
    return (
      'cuDNN needs queries, keys and values of one feature size, a multiple of '
      f'8 and at most 128: {size}, {values.shape[-1]}'
    )
  return None


def splash_refusal(
  queries: Described, keys: Described, values: Described
) -> str | None:
  """Why the kernel for TPUs does not take these arrays, or None."""
  sizes = queries.shape[-3], keys.shape[-3]
  if any(size == 0 or size % SPLASH_LANES for size in sizes):
    return (
      f'splash attention needs multiples of {SPLASH_LANES} queries and keys: '
      f'{sizes}'
    )
  features = queries.shape[-1], values.shape[-1]
  if any(size % SPLASH_LANES and size != 64 for size in features):
    return (
      f'splash attention needs features of 64 or multiples of {SPLASH_LANES}: '
      f'{features}'
    )
  return None


def cudnn_attention(
  queries: Array,
  keys: Array,
  values: Array,
  *,
  mask: Array | None,
  bias: Array | None,
  scale: float,
) -> Array:
  """Attention by cuDNN, with rows that may look at nothing set to zero.

  Args:
    queries: (*b, n, h, d).
    keys: (*b, m, h, d).
    values: (*b, m, h, d).
    mask: broadcasts to (*b, h, n, m); cuDNN turns it into a bias of that size.
    bias: broadcasts likewise, and is finite.
    scale: factor of the products.

  Returns:
    Messages, (*b, n, h, d).

  Raises:
    ValueError: dtypes or sizes that cuDNN does not take.
  """
  refusal = cudnn_refusal(queries, keys, values)
  if refusal:
    raise ValueError(refusal)
  lead = queries.shape[:-3]

  def batched(array):
    """Rank four: leading axes as one, which are there or of size one."""
    if array is None:
      return None
    missing = len(lead) + 3 - array.ndim
    array = array.reshape((1,) * missing + array.shape)
    if math.prod(array.shape[: len(lead)]) > 1:
      array = jnp.broadcast_to(array, lead + array.shape[len(lead) :])
    return array.reshape(-1, *array.shape[-3:])

  messages = jax.nn.dot_product_attention(
    *(x.reshape(-1, *x.shape[-3:]) for x in (queries, keys, values)),
    bias=batched(bias),
    mask=batched(mask),
    scale=scale,
    implementation='cudnn',
  ).reshape(values.shape[:-3] + queries.shape[-3:-1] + values.shape[-1:])
  if mask is not None:
    missing = len(lead) + 3 - mask.ndim
    alive = jnp.any(mask.reshape((1,) * missing + mask.shape), axis=-1)
    alive = jnp.swapaxes(alive, -1, -2)[..., None]
    messages = jnp.where(alive, messages, jnp.zeros((), messages.dtype))
  return messages


def splash_attention(
  queries: Array, keys: Array, values: Array, *, scale: float
) -> Array:
  """Attention without mask and bias by the block-wise TPU kernel of JAX.

  Args:
    queries: (*b, n, h, d).
    keys: (*b, m, h, d).
    values: (*b, m, h, f).
    scale: factor of the products.

  Returns:
    Messages, (*b, n, h, f).

  Raises:
    ValueError: sizes that the kernel does not take.
  """
  # Only TPUs need the kernel, and it takes a second to import.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  refusal = splash_refusal(queries, keys, values)
  if refusal:
    raise ValueError(refusal)
  n, heads = queries.shape[-3:-1]
  m = keys.shape[-3]
  rows, columns = (
    max(size for size in (128, 256, 512) if length % size == 0)
    for length in (n, m)
  )
  attention = kernel.make_splash_mha(
    mask=masks.MultiHeadMask([masks.FullMask((n, m))] * heads),
    block_sizes=kernel.BlockSizes(
      block_q=rows,
      block_kv=columns,
      block_kv_compute=columns,
      block_q_dkv=rows,
      block_kv_dkv=columns,
      block_kv_dkv_compute=columns,
      block_q_dq=rows,
      block_kv_dq=columns,
    ),
    head_shards=1,
    q_seq_shards=1,
  )
  queries = (queries.astype(jnp.float32) * scale).astype(queries.dtype)
  folded = (
    jnp.swapaxes(x, -3, -2).reshape(-1, heads, x.shape[-3], x.shape[-1])
    for x in (queries, keys, values)
  )
  messages = jnp.asarray(jax.vmap(attention)(*folded))
  messages = messages.reshape(*values.shape[:-3], *messages.shape[1:])
  return jnp.swapaxes(messages, -3, -2).astype(values.dtype)
