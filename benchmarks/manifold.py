"""Keys on an atlas against a plain key projection of the same tokens.

    python benchmarks/manifold.py [--tokens 49 197] [--activations gelu relu]

All run in this process on the same numbers, in turn. Gradients are those of the
parameters and of the tokens. Tokens of an image are a square grid; those too
many for one come before it.
"""

import argparse
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, machine, show, with_gradient

from msba_jax.models.manifold_keys import ManifoldKeys

ACTIVATIONS = {'gelu': jax.nn.gelu, 'relu': jax.nn.relu, 'none': None}
VARIANTS = 'vanilla', 'simple', 'unbalanced_atlas', 'spatial'


class Dense(nn.Module):
  """A plain projection, followed by an activation where there is one."""

  features: int
  activation: str = 'none'

  @nn.compact
  def __call__(self, inputs):
    """(*b, t, d) to (*b, t, features)."""
    keys = nn.Dense(self.features)(inputs)
    activation = ACTIVATIONS[self.activation]
    return keys if activation is None else activation(keys)


def modules(options, tokens):
  """The modules by name, the plain projection first."""
  side = math.isqrt(tokens)
  found = {'dense': Dense(options.features)}
  for name in options.activations:
    if name != 'none':
      found[f'dense, {name}'] = Dense(options.features, name)
    for variant in options.variants:
      place = {}
      if variant == 'spatial':
        place = {'grid': (side, side), 'prefix': tokens - side**2}
      found[f'{variant}, {name}'] = ManifoldKeys(
        options.features,
        variant,
        options.charts,
        options.budget,
        ACTIVATIONS[name],
        **place,
      )
  return found


def applied(module):
  """The module as a function of inputs and variables."""
  return lambda inputs, variables: module.apply(variables, inputs)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--images', type=int, default=64)
  parser.add_argument('--tokens', type=int, nargs='*', default=[49, 197])
  parser.add_argument('--features', type=int, default=384)
  parser.add_argument('--charts', type=int, default=8)
  parser.add_argument('--budget', default='equal')
  parser.add_argument(
    '--activations', nargs='*', default=['gelu', 'none'], choices=ACTIVATIONS
  )
  parser.add_argument(
    '--variants', nargs='*', default=VARIANTS, choices=VARIANTS
  )
  parser.add_argument('--repeats', type=int, default=20)
  options = parser.parse_args()
  print(machine())
  rng = np.random.default_rng(0)
  for tokens in options.tokens:
    shape = options.images, tokens, options.features
    print(
      f'{shape} tokens, {options.charts} charts, {options.budget} budget, '
      f'{options.repeats} repeats in turn'
    )
    inputs = jnp.asarray(rng.standard_normal(shape, np.float32))
    given = {
      name: (module, jax.jit(module.init)(jax.random.key(0), inputs))
      for name, module in modules(options, tokens).items()
    }
    for title, wrap in (
      ('forward', lambda x: x),
      ('forward and backward', with_gradient),
    ):
      calls = {
        name: functools.partial(
          jax.jit(wrap(applied(module))), inputs, variables
        )
        for name, (module, variables) in given.items()
      }
      show(title, interleaved(calls, options.repeats), 'dense')


if __name__ == '__main__':
  main()
