"""Attention over chosen blocks against our own dense attention.

    python benchmarks/sparse.py [--length 4096] [--block 128] [--others]

Every head and block of queries names random blocks of keys. All run in this
process on the same numbers, in turn; the ideal is the inverse of the share that
is kept.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, machine, ratio, show, with_gradient

from msba_jax.layers import attend, attend_blocks, block_mask

try:
  import torch
  from torch.nn.attention import flex_attention as flex
except ImportError:
  torch = None


def choices(rng, heads, count, lengths):
  """Random distinct blocks, as many in every row as `lengths` says."""
  indices = np.full((heads, count, max(lengths)), -1, np.int32)
  for head in range(heads):
    for row, length in enumerate(rng.permutation(lengths)):
      indices[head, row, :length] = rng.permutation(count)[:length]
  return jnp.asarray(indices)


def by_jax(queries, keys, values, mask):
  return jax.nn.dot_product_attention(
    queries[None], keys[None], values[None], mask=mask[None]
  )[0]


def by_flex_attention(arrays, mask, block):
  """The chosen blocks in torch; it has no gradient on CPU."""
  given = [
    torch.from_numpy(x).transpose(0, 1)[None].contiguous() for x in arrays
  ]
  mask = torch.from_numpy(np.array(mask))[None].to(torch.int32)
  length = torch.sum(mask, -1, dtype=torch.int32)
  order = torch.argsort(mask, dim=-1, descending=True, stable=True)
  chosen = flex.BlockMask.from_kv_blocks(
    torch.zeros_like(length),
    torch.zeros_like(order, dtype=torch.int32),
    length,
    order.to(torch.int32),
    BLOCK_SIZE=block,
  )
  attention = torch.compile(flex.flex_attention)

  def forward():
    with torch.no_grad():
      attention(*given, block_mask=chosen)

  return forward


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--length', type=int, default=4096)
  parser.add_argument('--heads', type=int, default=8)
  parser.add_argument('--features', type=int, default=64)
  parser.add_argument('--block', type=int, default=128)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--repeats', type=int, default=20)
  parser.add_argument('--shares', type=float, nargs='*', default=[0.1, 0.25, 1])
  parser.add_argument(
    '--others', action='store_true', help='jax.nn and torch at a quarter'
  )
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
  compared = choose_others if options.others else choose_shares
  functions, mask = compared(rng, options, count)
  for title, wrap in (
    ('forward', lambda x: x),
    ('forward and backward', with_gradient),
  ):
    calls = {
      name: functools.partial(timed(function, wrap), given, choice)
      for name, (function, choice) in functions.items()
    }
    if mask is not None and title == 'forward' and torch is not None:
      calls['torch FlexAttention'] = by_flex_attention(
        [np.array(x) for x in given], mask, options.block
      )
    times = interleaved(calls, options.repeats)
    first, *others = functions
    show(title, times, first)
    if not options.others:
      for name in others:
        print(f'  {first} / {name}: {ratio(times, first, name)}')


def choose_shares(rng, options, count):
  """Dense, and functions with their choices by name."""
  blocks = functools.partial(attend_blocks, block=options.block)
  functions = {'dense': (lambda *given: attend(*given[:3]), None)}
  for share in options.shares:
    keep = max(1, round(share * count))
    indices = choices(rng, options.heads, count, [keep] * count)
    functions[f'{keep} of {count} blocks'] = blocks, indices
  if 0.25 in options.shares and count >= 16:
    # From 0.4 to 1.6 of the mean, the longest four times the shortest.
    lengths = np.round(np.linspace(0.4, 1.6, count) * count / 4).astype(int)
    lengths[-1] += count * (count // 4) - lengths.sum()
    indices = choices(rng, options.heads, count, lengths)
    functions[f'{lengths.min()}..{lengths.max()} of {count}'] = blocks, indices
  return functions, None


def choose_others(rng, options, count):
  """A quarter of the blocks in other ways, and the mask of blocks."""
  blocks = functools.partial(attend_blocks, block=options.block)
  indices = choices(rng, options.heads, count, [count // 4] * count)
  mask = block_mask(indices, count)
  tokens = jnp.repeat(mask, options.block, axis=1)
  tokens = jnp.repeat(tokens, options.block, axis=2)
  return {
    f'{count // 4} of {count} blocks': (blocks, indices),
    'jax.nn, mask': (by_jax, tokens),
    # What follows after the large arrays of `jax.nn` is slowed down by them.
    'dense': (lambda *given: attend(*given[:3]), None),
  }, mask


def timed(function, wrap):
  """The compiled function of the arrays and the choice."""

  @jax.jit
  def call(given, choice):
    return wrap(lambda *arrays: function(*arrays, choice))(*given)

  return call


if __name__ == '__main__':
  main()
