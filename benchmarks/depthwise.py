"""A depthwise 3 × 3 convolution: ours against the library's.

    python benchmarks/depthwise.py

`depthwise_convolution` adds up shifted grids on CPU; elsewhere both are one.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, machine, show, with_gradient

from msba_jax.layers import depthwise_convolution

# Images, side and width of a grid: the fine grids of benchmarks/nexus.py.
SHAPES = ((8, 14, 384), (8, 32, 64), (4, 56, 64))


def library(grid, kernel):
  """What a user would otherwise call."""
  return jax.lax.conv_general_dilated(
    grid,
    kernel,
    window_strides=(1, 1),
    padding='SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=grid.shape[-1],
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--repeats', type=int, default=30)
  repeats = parser.parse_args().repeats
  print(machine())
  rng = np.random.default_rng(0)
  functions = {'ours': depthwise_convolution, 'jax.lax': library}
  for n, side, features in SHAPES:
    grid = jnp.asarray(rng.normal(size=(n, side, side, features)), 'float32')
    kernel = jnp.asarray(rng.normal(size=(3, 3, 1, features)), 'float32')
    both = {name: with_gradient(x) for name, x in functions.items()}
    for title, timed in (
      ('forward', functions),
      ('forward and backward', both),
    ):
      calls = {
        name: functools.partial(jax.jit(function), grid, kernel)
        for name, function in timed.items()
      }
      times = interleaved(calls, repeats)
      show(f'{n} x {side} x {side} x {features}, {title}', times, 'ours')


if __name__ == '__main__':
  main()
