"""What trained runs take at inference, whole models, in turn in one process.

    python benchmarks/nexus_inference.py RUN RUN [RUN ...] [--images 32]
    python benchmarks/nexus_inference.py RUN RUN --size 224 --images 8

For `experiments/fine_nexus.py` and other runs on images of one size. Images of
the test split are embedded alone (`solo`), as an index does it; with `--size`
at as many pixels a side, since parameters fit grids of any size. A run whose
grids attend densely is timed twice: with our own attention, which runs in
chunks, and with `jax.nn.dot_product_attention`. Memory is what XLA reserves
for temporary arrays. Ratios are to the last of all.
"""

import argparse
import dataclasses
import functools
import statistics

import jax
import numpy as np
from timing import interleaved, machine

from msba_jax.data.prefetch import load_batch
from msba_jax.metrics import compiled_cost
from msba_jax.models.context import solo
from msba_jax.models.cross_window_regions import GridAttention
from msba_jax.training.run import load_run


def by_jax(queries, keys, values, mask=None):
  """What a user would otherwise call."""
  return jax.nn.dot_product_attention(queries, keys, values, mask=mask)


def models(run):
  """The model by name, and with other attention where it is dense."""
  model, name = run.embedder.model, run.experiment.name
  yield name, model
  (mixer, *others) = getattr(model.msw, 'mixers', (None,))
  if not others and getattr(mixer, 'func', None) is GridAttention:
    mixers = (functools.partial(mixer, attend=by_jax),)
    yield f'{name}, jax.nn', model.clone(msw=model.msw.clone(mixers=mixers))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('runs', nargs='+', metavar='RUN')
  parser.add_argument('--images', type=int, default=32)
  parser.add_argument('--size', type=int, metavar='PIXELS')
  parser.add_argument('--repeats', type=int, default=30)
  options = parser.parse_args()
  print(machine())
  calls, bytes_of = {}, {}
  for path in options.runs:
    run = load_run(path)
    data = run.experiment.data
    data = dataclasses.replace(data, size=options.size or data.size)
    source = data.open().test.queries
    images = load_batch(source, np.arange(options.images))['image']
    for kind, model in models(run):
      name = f'{kind}, {path}'
      embedder = dataclasses.replace(run.embedder, model=model)

      def embed(variables, images, embedder=embedder):
        return embedder.apply(variables, images, solo)[0]

      arguments = run.embedder.variables, images
      bytes_of[name] = compiled_cost(embed, *arguments).temporary_bytes
      calls[name] = functools.partial(jax.jit(embed), *arguments)
  times = interleaved(calls, options.repeats)
  last = list(times)[-1]
  for name, seconds in times.items():
    middle = statistics.median(seconds)
    print(
      f'{1e3 * middle:8.1f} ms (min {1e3 * min(seconds):8.1f}) '
      f'{bytes_of[name] / 2**20:8.1f} MiB  '
      f'time {middle / statistics.median(times[last]):.2f}, '
      f'memory {bytes_of[name] / bytes_of[last]:.2f}  {name}'
    )


if __name__ == '__main__':
  main()
