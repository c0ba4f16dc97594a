r"""The loop of `ring`: shares of the keys go round the devices.

Attributes:
  Share: how a function attends to the keys of one device.
  run_ring: messages over the keys of all devices, with its own gradient.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from msba_jax.layers.chunks import heads_first, heads_last
from msba_jax.layers.online import Attended, merge_attended, row_shift
from msba_jax.layers.varying import varying_like

__all__ = ['Share', 'run_ring']


class Share(NamedTuple):
  """How a function attends to the keys of one device.

  Attributes:
    inward: an array in the layout of `attend`.
    outward: back from it, given the number of images.
    judged: from the options of a call to those with which the function itself
      tells whether the call is right.
    lay_out: (share, devices, queries, keys, values, …) of a call to the plan,
      what has no gradient (mask or choice of blocks), and the bias.
    forward: (plan, source, queries, keys, values, mask, bias) to `Attended`:
      arrays as `laid_out` gives them, keys and values from device `source`,
      mask and bias with the columns of all devices.
    backward: the same, then normalizer, shift and cotangent, to the gradients
      by queries, keys, values and the columns of the bias of these keys.
  """

  inward: Callable[[Array], Array]
  outward: Callable[[Array, int], Array]
  judged: Callable[[dict], dict]
  lay_out: Callable[..., tuple]
  forward: Callable[..., Attended]
  backward: Callable[..., tuple[Array, Array, Array, Array | None]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def run_ring(share, plan, axis_name, queries, keys, values, mask, bias):
  """Messages of the images of a device over the keys of all.

  Args:
    share: how the function attends to the keys of one device.
    plan: of these shapes, as `share.lay_out` gives it.
    axis_name: that images are spread over.
    queries: of this device, in the layout of the function, as the others.
    keys: of this device, of the dtype of the queries.
    values: of this device.
    mask: what has no gradient: rows of this device, columns of all.
    bias: likewise, with a gradient.

  Returns:
    Messages in the layout of the function and the dtype of the values.
  """
  arrays = queries, keys, values, mask, bias
  return _ring_forward(share, plan, axis_name, *arrays)[0]


def _ring_forward(share, plan, axis_name, queries, keys, values, mask, bias):
  asking, *shard = (_heads(share, x) for x in (queries, keys, values))

  def attend_to(source, shard, total):
    part = share.forward(plan, source, asking, *shard, mask, bias)
    return merge_attended(total, part)

  total = Attended(
    jnp.zeros((*asking.shape[:2], values.shape[-1]), jnp.float32),
    jnp.full(asking.shape[:2], -jnp.inf, jnp.float32),
  )
  total = _go_round(axis_name, attend_to, shard, total, last_apart=True)
  messages = _images(share, total.messages, queries, values.dtype)
  arrays = queries, keys, values, mask, bias
  return messages, (arrays, messages, total.normalizer)


def _ring_backward(share, plan, axis_name, residuals, cotangent):
  (queries, keys, values, mask, bias), messages, normalizer = residuals
  asking, *shard = (_heads(share, x) for x in (queries, keys, values))
  arriving, messages = (_heads(share, x) for x in (cotangent, messages))
  attended = Attended(messages, normalizer)
  change = Attended(arriving, jnp.zeros_like(normalizer))
  rows = normalizer, row_shift(attended, change), arriving

  def attend_to(source, shard, gradients):
    by_query, by_shard, by_bias = gradients
    # The sums follow their shard a step behind, and travel meanwhile too.
    by_shard = _pass_on(axis_name, by_shard)
    query_step, *shard_step, bias_step = share.backward(
      plan, source, asking, *shard, mask, bias, *rows
    )
    by_shard = jax.tree.map(jnp.add, by_shard, shard_step)
    by_bias = _add_columns(by_bias, bias_step, source)
    return by_query + query_step, by_shard, by_bias

  start = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32), (asking, shard, bias)
  )
  by_query, by_shard, by_bias = _go_round(
    axis_name, attend_to, shard, start, last_apart=False
  )
  by_key, by_value = _pass_on(axis_name, by_shard)
  return (
    _images(share, by_query, queries, queries.dtype),
    _images(share, by_key, keys, keys.dtype),
    _images(share, by_value, values, values.dtype),
    None,
    None if bias is None else by_bias.astype(bias.dtype),
  )


run_ring.defvjp(_ring_forward, _ring_backward)


def _go_round(axis_name, attend_to, shard, result, *, last_apart):
  """Shows this device its own shard, then those of the devices before it.

  `attend_to(source, shard, result)` gives the next result. A last step apart
  from the loop saves a journey, but its own memory lies idle meanwhile.
  """
  device, devices = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)

  def visit(step, carry):
    shard, result = carry
    following = _pass_on(axis_name, shard)
    return following, attend_to((device - step) % devices, shard, result)

  carry = shard, jax.tree.map(lambda x: varying_like(x, *shard), result)
  if devices > last_apart:
    carry = jax.lax.fori_loop(0, devices - last_apart, visit, carry)
  if last_apart:
    return attend_to((device + 1) % devices, *carry)
  return carry[1]


def _pass_on(axis_name, arrays):
  """The arrays of the device before this one."""
  devices = jax.lax.axis_size(axis_name)
  pairs = [(i, (i + 1) % devices) for i in range(devices)]
  return jax.lax.ppermute(arrays, axis_name, pairs)


def _add_columns(total, part, source):
  """The sum over shares of their columns, or of an axis of size one."""
  if total is None or total.shape == part.shape:
    return jax.tree.map(jnp.add, total, part)
  start = source * part.shape[2]
  return jax.lax.dynamic_update_slice_in_dim(
    total, part.astype(total.dtype), start, axis=2
  )


def _heads(share, array):
  """(g, n, d) of an array in the layout of the function."""
  return heads_first(share.inward(array))


def _images(share, array, like, dtype):
  """The inverse, for an array that was like another but in its last axis."""
  inward = jax.eval_shape(share.inward, like).shape
  array = heads_last(array.astype(dtype), inward[:-3], inward[-2])
  return share.outward(array, like.shape[0])
