"""What varies over the axes of a mesh, inside `jax.shard_map`.

Attributes:
  varying_like: an array that varies over the axes that others vary over.
  varying_alike: several arrays that vary over the same axes.
"""

import jax
from jaxtyping import Array

__all__ = ['varying_alike', 'varying_like']


def varying_like(array: Array, *others: Array) -> Array:
  """The array, varying over every mesh axis that the others vary over.

  Inside `jax.shard_map` a constant varies over no axis, and what a loop carries
  must vary from the start as it does in the end.
  """
  axes = frozenset().union(*(_axes(x) for x in others))
  missing = tuple(sorted(axes - _axes(array)))
  return jax.lax.pcast(array, missing, to='varying') if missing else array


def varying_alike(*arrays):
  """All arrays, varying over every mesh axis that any of them varies over."""
  given = [x for x in arrays if x is not None]
  return [None if x is None else varying_like(x, *given) for x in arrays]


def _axes(array: Array) -> frozenset:
  return jax.typeof(array).manual_axis_type.varying
