"""Dense attention against `jax.nn` and torch: time and memory.

    python benchmarks/attention.py [--length 4096] [--batch 1] [--dtype float32]

All run in this process on the same numbers, in turn. torch takes part where it
is installed. On a GPU the implementations of `attend` are compared with each
other and with cuDNN as `jax.nn` calls it.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, machine, show, with_gradient

from msba_jax.layers import attend
from msba_jax.layers.implementations import choose_implementation

try:
  import torch
except ImportError:
  torch = None


def by_jax(queries, keys, values, implementation=None):
  return jax.nn.dot_product_attention(
    queries, keys, values, implementation=implementation
  )


def by_torch(arrays, dtype, gradient):
  """The same in torch, heads first as it wants them."""
  given = [
    torch.from_numpy(x)
    .transpose(1, 2)
    .contiguous()
    .to(getattr(torch, dtype))
    .requires_grad_(gradient)
    for x in arrays
  ]
  change = given[0].detach()
  attention = torch.nn.functional.scaled_dot_product_attention

  def forward():
    with torch.no_grad():
      attention(*given)

  def both():
    torch.autograd.grad(attention(*given), given, change)

  return both if gradient else forward


def gradient_bytes(function, given):
  compiled = jax.jit(with_gradient(function)).lower(*given).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--length', type=int, default=4096)
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--heads', type=int, default=8)
  parser.add_argument('--features', type=int, default=64)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--repeats', type=int, default=20)
  parser.add_argument('--chunks', type=int, nargs='*', default=[])
  options = parser.parse_args()
  rng = np.random.default_rng(0)
  shape = options.batch, options.length, options.heads, options.features
  arrays = [rng.standard_normal(shape, np.float32) for _ in range(3)]
  given = [jnp.asarray(x, options.dtype) for x in arrays]
  print(machine())
  print(
    f'{options.batch} x {options.length} queries and keys, {options.heads} '
    f'heads x {options.features}, {options.dtype}, {options.repeats} repeats '
    f'in turn; attend takes {choose_implementation(*given)!r}'
  )
  functions = {'attend': attend, 'jax.nn': by_jax}
  for size in zip(options.chunks[::2], options.chunks[1::2], strict=True):
    functions[f'chunk {size}'] = functools.partial(attend, chunk=size)
  if jax.default_backend() == 'gpu':
    functions['chunked'] = functools.partial(attend, implementation='chunked')
    functions['jax.nn cudnn'] = functools.partial(
      by_jax, implementation='cudnn'
    )
  for title, wrap, gradient in (
    ('forward', lambda x: x, False),
    ('forward and backward', with_gradient, True),
  ):
    calls = {
      name: functools.partial(jax.jit(wrap(function)), *given)
      for name, function in functions.items()
    }
    if torch is None:
      print('torch is not installed and left out')
    else:
      calls[f'torch {torch.__version__}'] = by_torch(
        arrays, options.dtype, gradient
      )
    show(title, interleaved(calls, options.repeats), 'attend')
  ours, theirs = (gradient_bytes(x, given) for x in (attend, by_jax))
  print(
    f'temporary memory of the gradient: {ours / 2**20:.1f} MiB, jax.nn '
    f'{theirs / 2**20:.1f} MiB, {theirs / ours:.1f} x'
  )


if __name__ == '__main__':
  main()
