"""Deformable attention against softmax attention over all tokens of all levels.

    python benchmarks/deformable.py [--grid 14] [--repeats 10] [--others]

Every token of a grid asks levels of that same grid. All run in this process, in
turn. `--others` adds what was left: bilinear reading as a product with a matrix
(tokens asking x tokens read), and one gather of all corners of a level.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, machine, show

from msba_jax.layers import attend
from msba_jax.layers.deformable import deformable_attention


def by_softmax(queries, keys, values):
  """Plain attention: keys and values are the tokens of all levels."""
  n, *_, h, f = values[0].shape
  keys, values = (
    jnp.concatenate([x.reshape(n, -1, h, f) for x in levels], axis=1)
    for levels in (keys, values)
  )
  return attend(queries, keys, values)


def shares_of(places, size):
  """How much of each of `size` pixels a place holds: (…, size)."""
  low = jnp.floor(places)
  part = places - low
  pixels = jnp.arange(size).reshape((1,) * places.ndim + (size,))
  return jnp.where(pixels == low[..., None], 1 - part[..., None], 0) + (
    jnp.where(pixels == low[..., None] + 1, part[..., None], 0)
  )


def by_matrix(values, locations, weights):
  """Shares of all pixels, separable in x and y, times the values."""
  total = 0
  for i, level in enumerate(values):
    _, y, x, *_ = level.shape
    places = locations[:, :, :, i]
    columns = shares_of(places[..., 0] * x - 0.5, x)
    rows = shares_of(places[..., 1] * y - 0.5, y)
    rows = rows * weights[:, :, :, i, :, None]
    matrix = jnp.einsum('nthpy,nthpx->nhtyx', rows, columns)
    total += jnp.einsum('nhtyx,nyxhf->nthf', matrix, level)
  return total


def by_one_gather(values, locations, weights):
  """All corners of all points of a level at once."""
  total = 0
  for i, level in enumerate(values):
    n, y, x, h, _ = level.shape
    corners = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    pixels = locations[:, :, :, i] * jnp.array([[[[[x, y]]]]]) - 0.5
    low = jnp.floor(pixels)
    part = (pixels - low)[..., None, :]
    ahead = corners.reshape((1,) * (low.ndim - 1) + corners.shape)
    places = low[..., None, :].astype(jnp.int32) + ahead
    share = jnp.prod(jnp.where(ahead == 1, part, 1 - part), axis=-1)
    share = share * weights[:, :, :, i, :, None]
    images = jnp.arange(n).reshape(n, 1, 1, 1, 1)
    heads = jnp.arange(h).reshape(1, 1, h, 1, 1)
    sampled = level.at[images, places[..., 1], places[..., 0], heads].get(
      mode='fill', fill_value=0, wrap_negative_indices=False
    )
    total += jnp.einsum('nthpcf,nthpc->nthf', sampled, share)
  return total


def with_gradient(function):
  """The result, and gradients of all arrays for the first of them."""

  def both(change, *given):
    result, pull = jax.vjp(function, *given)
    return result, pull(change)

  return both


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--images', type=int, default=8)
  parser.add_argument('--grid', type=int, default=14)
  parser.add_argument('--levels', type=int, default=4)
  parser.add_argument('--heads', type=int, default=16)
  parser.add_argument('--points', type=int, default=4)
  parser.add_argument('--features', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=10)
  parser.add_argument(
    '--others', action='store_true', help='forms of reading that were left'
  )
  options = parser.parse_args()
  rng = np.random.default_rng(0)
  n, size, h = options.images, options.grid, options.heads
  tokens = n, size * size, h

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))

  def levels():
    return [
      draw(n, size, size, h, options.features) for _ in range(options.levels)
    ]

  queries, keys, values = draw(*tokens, options.features), levels(), levels()
  points = *tokens, options.levels, options.points
  # A tenth of the map beyond its border on every side.
  locations = jnp.asarray(rng.uniform(-0.1, 1.1, (*points, 2)), jnp.float32)
  weights = jax.nn.softmax(draw(*points), axis=(-2, -1))
  print(machine())
  print(
    f'{n} images, {size} x {size} tokens, {options.levels} levels, {h} heads x '
    f'{options.features}, {options.points} points, float32, {options.repeats} '
    'repeats in turn'
  )
  sampled = values, locations, weights
  functions = {
    'deformable': (deformable_attention, sampled),
    'softmax': (by_softmax, (queries, keys, values)),
  }
  if options.others:
    functions['product with a matrix'] = by_matrix, sampled
    functions['one gather'] = by_one_gather, sampled
  for title, wrap in (
    ('forward', lambda function: lambda _, *arrays: function(*arrays)),
    ('forward and backward', with_gradient),
  ):
    calls, expected = {}, None
    for name, (function, given) in functions.items():
      call = jax.jit(wrap(function)).lower(queries, *given).compile()
      memory = call.memory_analysis().temp_size_in_bytes / 2**20
      print(f'  {name}: {memory:.0f} MiB of temporary memory')
      calls[name] = functools.partial(call, queries, *given)
      if given is sampled:
        expected = calls[name]() if expected is None else expected
        jax.tree.map(
          functools.partial(np.testing.assert_allclose, atol=1e-3),
          calls[name](),
          expected,
        )
    show(title, interleaved(calls, options.repeats), 'deformable')


if __name__ == '__main__':
  main()
