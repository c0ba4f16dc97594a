"""Attention over chosen blocks against our own dense attention.

    python benchmarks/sparse.py [--length 4096] [--block 128]

Every head and block of queries names random blocks of keys. All run in this
process on the same numbers, in turn; the ideal is the inverse of the share that
is kept.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, machine, show, with_gradient

from msba_jax.layers import attend, attend_blocks, block_mask


def choices(rng, heads, count, lengths):
  """Random distinct blocks, as many in every row as `lengths` says."""
  indices = np.full((heads, count, max(lengths)), -1, np.int32)
  for head in range(heads):
    for row, length in enumerate(rng.permutation(lengths)):
      indices[head, row, :length] = rng.permutation(count)[:length]
  return jnp.asarray(indices)


def by_jax(mask, queries, keys, values):
  return jax.nn.dot_product_attention(
    queries[None], keys[None], values[None], mask=mask[None]
  )[0]


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--length', type=int, default=4096)
  parser.add_argument('--heads', type=int, default=8)
  parser.add_argument('--features', type=int, default=64)
  parser.add_argument('--block', type=int, default=128)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--repeats', type=int, default=20)
  parser.add_argument('--shares', type=float, nargs='*', default=[0.1, 0.25, 1])
  parser.add_argument('--masked', action='store_true', help='jax.nn as well')
  options = parser.parse_args()
  rng = np.random.default_rng(0)
  shape = options.length, options.heads, options.features
  given = [
    jnp.asarray(rng.standard_normal(shape, np.float32), options.dtype)
    for _ in range(3)
  ]
  count = options.length // options.block
  print(machine())
  print(
    f'{options.length} queries and keys, {options.heads} heads x '
    f'{options.features}, blocks of {options.block}, {options.dtype}, '
    f'{options.repeats} repeats in turn'
  )
  functions = {'dense': attend}
  for share in options.shares:
    keep = max(1, round(share * count))
    indices = choices(rng, options.heads, count, [keep] * count)
    functions[f'{keep} of {count} blocks'] = functools.partial(
      attend_blocks, block_indices=indices, block=options.block
    )
    if options.masked and share == 0.25:
      mask = block_mask(indices, count)
      mask = jnp.repeat(mask, options.block, axis=1)
      mask = jnp.repeat(mask, options.block, axis=2)
      functions['jax.nn, mask'] = functools.partial(by_jax, mask)
  if 0.25 in options.shares and count >= 16:
    # From 0.4 to 1.6 of the mean, the longest four times the shortest.
    lengths = np.round(np.linspace(0.4, 1.6, count) * count / 4).astype(int)
    lengths[-1] += count * (count // 4) - lengths.sum()
    indices = choices(rng, options.heads, count, lengths)
    functions[f'{lengths.min()}..{lengths.max()} of {count}'] = (
      functools.partial(
        attend_blocks, block_indices=indices, block=options.block
      )
    )
  for title, wrap in (
    ('forward', lambda x: x),
    ('forward and backward', with_gradient),
  ):
    calls = {
      name: functools.partial(jax.jit(wrap(function)), *given)
      for name, function in functions.items()
    }
    times = interleaved(calls, options.repeats)
    show(title, times, 'dense')
    for name in list(functions)[1:]:
      least = min(times['dense']) / min(times[name])
      middle = np.median(times['dense']) / np.median(times[name])
      print(f'  dense / {name}: {least:.2f} x (min), {middle:.2f} x (median)')


if __name__ == '__main__':
  main()
