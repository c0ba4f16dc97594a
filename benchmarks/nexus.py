"""A transformer block with sparse attention against the same block, dense.

    python benchmarks/nexus.py [--shares 0.125 0.25] [--gradients]

One block, pre-norm attention and feed-forward, with parameters of the same
shapes: on grids, `SparseAttention` that keeps a fixed share of regions against
dense attention; in a batch, where every image sees the tokens of all, four
regions of its own and four of other images against all tokens. Dense is
`jax.nn.dot_product_attention`, and our own `attend`, which runs in chunks. All
run in turn in this process. Beside the measured ratios stands what is possible
at all: the share of attention products in the multiply-adds of the block. What
is kept counts the means of the regions that are not, each as a token.

Memory is what XLA reserves for temporary arrays of the compiled function. Its
FLOPs are printed where the program has no loop, of which a compiler counts one
round; the products of the others follow from what they keep.
"""

import argparse
import functools
import statistics
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, machine

from msba_jax.layers import attend, attend_blocks, block_topk
from msba_jax.metrics import attention_share, block_flops, compiled_cost
from msba_jax.models.blocks import (
  FeedForward,
  queries_keys_values,
  split_heads,
)
from msba_jax.models.sparse_attention import (
  SparseAttention,
  cell_side,
  region_side,
)

HEAD = 32
# Name, images, grid, width, side of a region.
GRIDS = (
  ('14 x 14', 8, 14, 384, 7),
  ('32 x 32', 8, 32, 64, 8),
  ('56 x 56', 4, 56, 64, 8),
)
JOINT = (32, 14, 384, 7)
CHOSEN = 4


def by_jax(queries, keys, values):
  """What a user would otherwise call."""
  lead = queries.ndim == 3
  arrays = (x[None] if lead else x for x in (queries, keys, values))
  messages = jax.nn.dot_product_attention(*arrays)
  return messages[0] if lead else messages


class Block(nn.Module):
  """A transformer block over grids."""

  region: int
  share: float = 1.0
  dense: Callable[..., jax.Array] | None = None

  @nn.compact
  def __call__(self, grid):
    """Tokens (n, y, x, d), and the share of pairs that is kept."""
    n, height, width, features = grid.shape
    normal, kept = nn.LayerNorm()(grid), jnp.ones(())
    if self.dense is None:
      messages, told = SparseAttention(
        features // HEAD, self.region, (self.share,)
      )(normal)
      # All cells have means, and those of kept regions are masked.
      cell = cell_side(region_side(height, width, self.region))
      kept = jnp.mean(told['kept']) + 1 / cell**2
    else:
      tokens = normal.reshape(n, height * width, features)
      heads = (
        split_heads(x, features // HEAD)
        for x in queries_keys_values(tokens, features)
      )
      messages = self.dense(*heads).reshape(grid.shape)
      messages = nn.Dense(features)(messages)
    grid = grid + messages
    inner = FeedForward(4 * features)(nn.LayerNorm()(grid))
    return grid + inner, kept


class JointBlock(nn.Module):
  """A transformer block in which tokens see those of all images."""

  region: int
  dense: Callable[..., jax.Array] | None = None

  @nn.compact
  def __call__(self, tokens):
    """Tokens (n, t, d), and the share of pairs that is kept."""
    n, t, d = tokens.shape
    joint = tokens.reshape(n * t, d)
    projected = queries_keys_values(nn.LayerNorm()(joint), d)
    heads = [split_heads(x, d // HEAD) for x in projected]
    kept = jnp.ones(())
    if self.dense is not None:
      messages = self.dense(*heads)
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
  """A function without arguments, what it keeps, its bytes and FLOPs."""
  variables = jax.jit(block.init)(jax.random.key(0), inputs)

  def forward(variables, inputs):
    return block.apply(variables, inputs)[0]

  def both(variables, inputs):
    messages, pull = jax.vjp(forward, variables, inputs)
    return messages, pull(inputs)

  run = both if gradients else forward
  cost = compiled_cost(run, variables, inputs)
  kept = jax.jit(lambda *x: block.apply(*x)[1])(variables, inputs)
  return functools.partial(jax.jit(run), variables, inputs), float(kept), cost


def compare(title, blocks, inputs, tokens, options):
  """Prints every block, and its ratios to both dense ones."""
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
  whole = block_flops(tokens, features)
  for name, (_, kept, cost) in made.items():
    products = block_flops(tokens, features, kept=kept) / whole
    flops = 'in loops'
    if not cost.loops:
      flops = f'{cost.flops / 1e9:.2f} GFLOP'
    ratios = ', '.join(
      f'of {other} time {middle[name] / middle[other]:.2f} memory '
      f'{cost.temporary_bytes / made[other][2].temporary_bytes:.2f}'
      for other in ('jax.nn', 'attend')
    )
    print(
      f'  {name:7s} kept {100 * kept:5.1f} %  {1e3 * middle[name]:7.1f} ms '
      f'(min {1e3 * min(times[name]):7.1f}) '
      f'{cost.temporary_bytes / 2**20:7.1f} MiB  {flops:12s} '
      f'products {products:.2f}  {ratios}'
    )
  if ceiling < 0.5:
    print(
      '  half of the time is out of reach here: without any attention products '
      f'{1 - ceiling:.2f} of the block remains'
    )


def on_grids(options):
  """Regions of an image against all of it."""
  rng = np.random.default_rng(0)
  for title, n, side, features, region in GRIDS:
    inputs = jnp.asarray(rng.normal(size=(n, side, side, features)), 'float32')
    blocks = {
      'jax.nn': Block(region, dense=by_jax),
      'attend': Block(region, dense=attend),
    } | {f'{share:g}': Block(region, share) for share in options.shares}
    compare(title, blocks, inputs, side * side, options)


def in_a_batch(options):
  """Regions of an image and of others against all tokens of a batch."""
  n, side, features, region = JOINT
  rng = np.random.default_rng(0)
  inputs = jnp.asarray(rng.normal(size=(n, side * side, features)), 'float32')
  blocks = {
    'jax.nn': JointBlock(region, by_jax),
    'attend': JointBlock(region, attend),
    f'{CHOSEN} + {CHOSEN}': JointBlock(region),
  }
  tokens = n * side * side
  compare(f'{side} x {side} of a batch', blocks, inputs, tokens, options)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--shares', type=float, nargs='*', default=[0.125, 0.25])
  parser.add_argument('--repeats', type=int, default=30)
  parser.add_argument(
    '--gradients', action='store_true', help='forward and backward'
  )
  parser.add_argument('--only', choices=('grids', 'joint'))
  options = parser.parse_args()
  print(machine())
  if options.only != 'joint':
    on_grids(options)
  if options.only != 'grids':
    in_a_batch(options)


if __name__ == '__main__':
  main()
