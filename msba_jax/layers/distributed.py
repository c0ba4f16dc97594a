r"""Attention over images that are spread over the devices of a mesh axis.

Every device holds some of the images: their queries, keys and values, and its
own rows of mask and bias with the columns of all images. What is built here is
called inside `jax.shard_map` or `jax.pmap` in place of the function that it was
built from, and gives every device the messages of its own images.

`gathered` brings all keys and values to every device. `ring` passes them on and
never holds more than two shards: its memory does not grow with the devices.

Attributes:
  gathered: keys and values of all devices at once.
  ring: the keys and values of one device at a time.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from msba_jax.layers.attention import attend
from msba_jax.layers.block_sparse import sparse_attention, sparse_gradients
from msba_jax.layers.chunked import chunked_attention
from msba_jax.layers.chunked_gradients import chunked_gradients
from msba_jax.layers.chunks import laid_out
from msba_jax.layers.in_batch import attend_across_images, attend_joint_tokens
from msba_jax.layers.ring_loop import Share, run_ring
from msba_jax.layers.sparse import (
  attend_blocks,
  attend_image_blocks,
  laid_out_blocks,
)
from msba_jax.layers.varying import varying_alike

__all__ = ['gathered', 'ring']

AxisName = str | tuple[str, ...]

# Functions whose images lie on the first axis, not on the third from the end.
_IMAGES_FIRST = (attend_across_images, attend_joint_tokens, attend_image_blocks)


def gathered(attend_fn: Callable[..., Array], axis_name: AxisName) -> Callable:
  r"""Attention to the images of all devices: o_i = attend(q_i, [k_1 … k_P], …).

  Every device gathers the keys and values of all P and attends with its own
  queries. The gradients of keys and values are summed over the devices and
  scattered back.

  Args:
    attend_fn: `attend`, `attend_blocks`, or a function of queries, keys and
      values with images on the third axis from the end; or one of
      `attend_across_images`, `attend_joint_tokens` and `attend_image_blocks`,
      with images on the first.
    axis_name: of the mesh axis, or of `jax.pmap`, that images are spread over.

  Returns:
    A function with the arguments of `attend_fn`, for use inside `jax.shard_map`
    or `jax.pmap`: queries, keys and values of the images of a device; mask and
    bias with its rows and the columns of all images, or axes of size one.

  Raises:
    ValueError, TypeError: by the result, as `attend_fn` does.

  Example:
    >>> images = jnp.array([[[[1.0]], [[3.0]]]])
    >>> attend_all = jax.pmap(gathered(attend, 'devices'), axis_name='devices')
    >>> attend_all(0 * images, images, images).ravel().tolist()
    [2.0, 2.0]
  """
  known = getattr(attend_fn, 'func', attend_fn)
  axis = 0 if known in _IMAGES_FIRST else -3

  @functools.wraps(attend_fn)
  def attend_gathered(queries, keys, values, *choice, **options):
    keys, values = (
      jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)
      for x in (keys, values)
    )
    return attend_fn(queries, keys, values, *choice, **options)

  return attend_gathered


def ring(attend_fn: Callable[..., Array], axis_name: AxisName) -> Callable:
  r"""Attention to the images of all devices, one device's share at a time.

  Keys and values go round the devices; with o_p and lse_p the messages and
  log-normalisers from the keys of device p,

      lse = log Σ_p exp(lse_p),    o = Σ_p exp(lse_p − lse) o_p

  merged in float32 as they come. In the gradient they go round once more, and
  the sums of their own gradients with them, in float32. The next share travels
  while the present one is computed, and no scores of all pairs are ever made.

  Args:
    attend_fn: `attend`, `attend_across_images`, `attend_joint_tokens`,
      `attend_blocks` or `attend_image_blocks`. Of chosen blocks, a device
      computes those that the share at hand holds, and passes on all of it.
    axis_name: of the mesh axis, or of `jax.pmap`, that images are spread over.

  Returns:
    A function as `gathered` returns. Its implementation is always 'chunked', so
    that there is no forward-mode derivative.

  Raises:
    TypeError: there is no ring for this function; by the result, as it does.
    ValueError: by the result, as the function does, or if the implementation is
      not 'chunked'.

  Example:
    >>> images = jnp.array([[[[1.0]], [[3.0]]]])
    >>> attend_all = jax.pmap(ring(attend, 'devices'), axis_name='devices')
    >>> attend_all(0 * images, images, images).ravel().tolist()
    [2.0, 2.0]

  Source: Ring Attention with Blockwise Transformers for Near-Infinite Context
  (2023), arXiv 2310.01889; Online normalizer calculation for softmax (2018),
  arXiv 1805.02867.
  """
  if attend_fn not in _SHARES:
    names = ', '.join(function.__name__ for function in _SHARES)
    raise TypeError(
      f'ring takes {names}, not {attend_fn!r}: use gathered, which takes others'
    )
  share = _SHARES[attend_fn]
  whole = gathered(attend_fn, axis_name)

  @functools.wraps(attend_fn)
  def attend_ring(queries, keys, values, *choice, **options):
    # The function itself judges the arguments; nothing is gathered.
    arrays = {k: v for k, v in options.items() if hasattr(v, 'shape')}
    fixed = {k: v for k, v in options.items() if k not in arrays}
    judge = functools.partial(whole, **share.judged(fixed))
    jax.eval_shape(judge, queries, keys, values, *choice, **arrays)
    devices = jax.lax.axis_size(axis_name)
    plan, mask, bias = share.lay_out(
      share, devices, queries, keys, values, *choice, **options
    )
    dtype = jnp.promote_types(queries.dtype, keys.dtype)
    # What is the same on all devices gets the sum of their gradients here.
    _, *arrays = varying_alike(
      jax.lax.axis_index(axis_name),
      queries.astype(dtype),
      keys.astype(dtype),
      values,
      mask,
      bias,
    )
    return run_ring(share, plan, axis_name, *arrays)

  return attend_ring


def _judged_dense(options):
  """Options with which the dense form says what is wrong with a call."""
  implementation = options.get('implementation')
  if implementation not in (None, 'chunked'):
    raise ValueError(
      f"{implementation=} must be 'chunked' or None in a ring: gathered takes "
      'the others'
    )
  options = {name: x for name, x in options.items() if name != 'chunk'}
  return options | {'implementation': 'dense'}


def _lay_out_dense(
  share, devices, queries, keys, values, *, mask=None, bias=None,
  image_mask=None, scale=None, precision=None, implementation=None, chunk=None,
):  # fmt: skip
  """Plan, mask and bias of the functions that attend to all keys."""
  del devices, implementation
  tile = (1, 1)
  if image_mask is not None:
    mask, tile = image_mask, (queries.shape[1], keys.shape[1])
  plan, arrays = laid_out(
    share.inward(queries),
    share.inward(keys),
    share.inward(values),
    mask=mask,
    bias=bias,
    scale=1 / math.sqrt(queries.shape[-1]) if scale is None else scale,
    precision=precision,
    chunk=chunk,
    tile=tile,
  )
  return plan, *arrays[-2:]


def _lay_out_blocks(
  share, devices, queries, keys, values, block_indices, *, block=None,
  scale=None, precision=None,
):  # fmt: skip
  """Plan and choices of blocks; there is no bias."""
  if block is None:
    block = queries.shape[1], keys.shape[1]
  plan, (*_, indices) = laid_out_blocks(
    share.inward(queries),
    share.inward(keys),
    share.inward(values),
    block_indices,
    block,
    scale,
    precision,
    shares=devices,
  )
  length = share.inward(keys).shape[-3]
  if length % plan.columns:
    raise ValueError(
      f'the {length} keys of a device are no whole number of '
      f'blocks of {plan.columns}'
    )
  return plan, indices, None


def _dense_forward(plan, source, queries, keys, values, mask, bias):
  mask = _columns(mask, source, keys.shape[1] // plan.tile[1])
  bias = _columns(bias, source, keys.shape[1])
  return chunked_attention(plan, queries, keys, values, mask, bias)


def _dense_backward(plan, source, queries, keys, values, mask, bias, *rows):
  mask = _columns(mask, source, keys.shape[1] // plan.tile[1])
  bias = _columns(bias, source, keys.shape[1])
  *gradients, _, by_bias = chunked_gradients(
    plan, queries, keys, values, mask, bias, *rows
  )
  return (*gradients, by_bias)


def _columns(array, source, width):
  """The columns of the keys of one device; an axis of size one is for all."""
  if array is None or array.shape[2] == 1:
    return array
  return jax.lax.dynamic_slice_in_dim(array, source * width, width, axis=2)


def _blocks_forward(plan, source, queries, keys, values, indices, bias):
  del bias
  indices = indices - source * (keys.shape[1] // plan.columns)
  return sparse_attention(plan, queries, keys, values, indices)


def _blocks_backward(plan, source, queries, keys, values, indices, bias, *rows):
  # What is no block of this device has an index that is none.
  indices = indices - source * (keys.shape[1] // plan.columns)
  gradients = sparse_gradients(plan, queries, keys, values, indices, *rows)
  return (*gradients, bias)


def _share(inward, outward, *, blocks=False):
  if blocks:
    parts = _blocks_forward, _blocks_backward
    return Share(inward, outward, lambda x: x, _lay_out_blocks, *parts)
  parts = _dense_forward, _dense_backward
  return Share(inward, outward, _judged_dense, _lay_out_dense, *parts)


def _as_it_is(array, images=None):
  del images
  return array


def _regions_first(array, images=None):
  del images
  return jnp.swapaxes(array, 0, 1)


def _flat(array):
  return array.reshape(-1, *array.shape[2:])


def _images(array, images):
  return array.reshape(images, -1, *array.shape[1:])


_SHARES = {
  attend: _share(_as_it_is, _as_it_is),
  attend_across_images: _share(_regions_first, _regions_first),
  attend_joint_tokens: _share(_flat, _images),
  attend_blocks: _share(_as_it_is, _as_it_is, blocks=True),
  attend_image_blocks: _share(_flat, _images, blocks=True),
}
