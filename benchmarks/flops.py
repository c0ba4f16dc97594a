"""What an image costs each of several experiments at inference, alone.

    python benchmarks/flops.py experiments/scenes_nexus.py:msba \
        experiments/scenes_nexus.py [overrides of all]

FLOPs and temporary memory as XLA counts them for the whole model, of a batch
of 32; a loop counts once, however often it runs. Nothing is run.
"""

import argparse

import jax
import jax.numpy as jnp

from msba_jax.metrics import compiled_cost
from msba_jax.models.context import solo
from msba_jax.training.load import load_experiment

IMAGES = 32


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('experiments', nargs='+')
  options, overrides = parser.parse_known_args()
  for name in options.experiments:
    experiment = load_experiment(name, overrides)
    model, size = experiment.model, experiment.data.size
    images = jax.ShapeDtypeStruct((IMAGES, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    cost = compiled_cost(
      lambda *given, model=model: model.apply(*given, context=solo)[0],
      variables,
      images,
    )
    print(
      f'{experiment.name}: {cost.flops / IMAGES / 1e6:.1f} MFLOP an image, '
      f'{cost.temporary_bytes / 2**20:.1f} MiB, {cost.loops} loops'
    )


if __name__ == '__main__':
  main()
