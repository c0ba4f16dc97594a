"""A transformer block with sparse attention against the same block, dense.

    python benchmarks/nexus.py [--shares 0.125 0.25] [--gradients]

One block, pre-norm attention and feed-forward, with the same parameters: on
grids, `SparseAttention` that keeps a fixed share of regions against the same
module with `dense=True`; in a batch, where every image sees the tokens of all,
four regions of its own and four of other images against all tokens. All run in
turn in this process. Beside the measured ratios stands what is possible at all:
the share of attention products in the multiply-adds of the block.

Memory is what XLA reserves for temporary arrays of the compiled function. The
products of the sparse block are counted from what it keeps: a compiler counts
a loop once, however often it runs.
"""

import argparse
import functools
import statistics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, machine

from msba_jax.layers import attend, attend_blocks, block_topk
from msba_jax.metrics.cost import attention_share, block_flops
from msba_jax.models.blocks import (
  FeedForward,
  queries_keys_values,
  split_heads,
)
from msba_jax.models.sparse_attention import SparseAttention

HEAD = 32
# Name, images, grid, width, side of a region.
GRIDS = (
  ('14 x 14', 8, 14, 384, 7),
  ('32 x 32', 8, 32, 64, 8),
  ('56 x 56', 4, 56, 64, 8),
)
JOINT = (32, 14, 384, 7)
CHOSEN = 4


class Block(nn.Module):
  """A transformer block over grids."""

  region: int
  share: float
  dense: bool

  @nn.compact
  def __call__(self, grid):
    """Tokens (n, y, x, d), and the share of pairs that is kept."""
    messages, told = SparseAttention(
      grid.shape[-1] // HEAD, self.region, (self.share,), dense=self.dense
    )(nn.LayerNorm()(grid))
    grid = grid + messages
    inner = FeedForward(4 * grid.shape[-1])(nn.LayerNorm()(grid))
    return grid + inner, jnp.mean(told['kept'])


class JointBlock(nn.Module):
  """A transformer block in which tokens see those of all images."""

  region: int
  dense: bool

  @nn.compact
  def __call__(self, tokens):
    """Tokens (n, t, d), and the share of pairs that is kept."""
    n, t, d = tokens.shape
    joint = tokens.reshape(n * t, d)
    projected = queries_keys_values(nn.LayerNorm()(joint), d)
    heads = [split_heads(x, d // HEAD) for x in projected]
    kept = jnp.ones(())
    if self.dense:
      messages = attend(*heads)
    else:
      block = self.region**2
      owner = np.arange(n * t // block) * block // t
      own = jnp.asarray(owner[:, None] == owner)
      queries, keys = (x[:, None] for x in projected[:2])
      choose = functools.partial(
        block_topk, queries, keys, block=block, keep=CHOSEN
      )
      indices = jnp.concatenate([choose(mask=own), choose(mask=~own)], axis=-1)
      messages = attend_blocks(*heads, indices, block=block)
      kept = jnp.mean(jnp.sum(indices >= 0, axis=-1)) / own.shape[-1]
    joint = joint + nn.Dense(d)(messages.reshape(n * t, d))
    joint = joint + FeedForward(4 * d)(nn.LayerNorm()(joint))
    return joint.reshape(tokens.shape), kept


def compiled(block, inputs, *, gradients):
  """A function without arguments, its temporary bytes, and what it keeps."""
  variables = jax.jit(block.init)(jax.random.key(0), inputs)

  def forward(variables, inputs):
    return block.apply(variables, inputs)[0]

  def both(variables, inputs):
    messages, pull = jax.vjp(forward, variables, inputs)
    return messages, pull(inputs)

  run = jax.jit(both if gradients else forward)
  run = run.lower(variables, inputs).compile()
  kept = jax.jit(lambda *x: block.apply(*x)[1])(variables, inputs)
  memory = run.memory_analysis().temp_size_in_bytes
  return functools.partial(run, variables, inputs), memory, float(kept)


def compare(title, blocks, inputs, tokens, options):
  """Prints dense against each sparse block."""
  features = inputs.shape[-1]
  ceiling = attention_share(tokens, features)
  print(
    f'{title}, {inputs.shape[0]} images, C {features}: {tokens} tokens see '
    f'each other, attention products are {100 * ceiling:.1f} % of a block'
  )
  made = {
    name: compiled(block, inputs, gradients=options.gradients)
    for name, block in blocks.items()
  }
  times = interleaved(
    {name: run for name, (run, _, _) in made.items()}, options.repeats
  )
  middle = {name: statistics.median(x) for name, x in times.items()}
  for name, (_, memory, kept) in made.items():
    products = block_flops(tokens, features, kept=kept) / block_flops(
      tokens, features
    )
    print(
      f'  {name:12s} kept {100 * kept:5.1f} %  {1e3 * middle[name]:8.1f} ms '
      f'(min {1e3 * min(times[name]):8.1f})  {memory / 2**20:8.1f} MiB'
      f'   time {middle[name] / middle["dense"]:.2f} x,'
      f' memory {memory / made["dense"][1]:.2f} x,'
      f' products {products:.2f} x'
    )
  if ceiling < 0.5:
    print(
      f'  less than half of the time is out of reach here: without any '
      f'attention products {1 - ceiling:.2f} x of the block remains'
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--shares', type=float, nargs='*', default=[0.125, 0.25])
  parser.add_argument('--repeats', type=int, default=30)
  parser.add_argument(
    '--gradients', action='store_true', help='forward and backward'
  )
  options = parser.parse_args()
  print(machine())
  rng = np.random.default_rng(0)
  for title, n, side, features, region in GRIDS:
    inputs = jnp.asarray(rng.normal(size=(n, side, side, features)), 'float32')
    blocks = {'dense': Block(region, 1.0, True)} | {
      f'{share:g}': Block(region, share, False) for share in options.shares
    }
    compare(title, blocks, inputs, side * side, options)
  n, side, features, region = JOINT
  inputs = jnp.asarray(rng.normal(size=(n, side * side, features)), 'float32')
  compare(
    f'{side} x {side} of a batch',
    {
      'dense': JointBlock(region, True),
      f'{CHOSEN} + {CHOSEN}': JointBlock(region, False),
    },
    inputs,
    n * side * side,
    options,
  )


if __name__ == '__main__':
  main()
