"""Step time and memory of experiments, beside those of the first.

    python benchmarks/steps.py experiments/scenes_msba.py \
        experiments/scenes_castle.py [--repeats 20] [overrides of all]

Images are noise of the experiment's size. Steps are timed in turn, for each
kind of context that a step may draw, if any model looks at one; `embed` is the
batch embedded alone, without gradients. Memory is what XLA reserves for the
temporary arrays of a compiled step. Frozen backbones are not frozen here.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

from msba_jax.data.transforms import normalize_image
from msba_jax.retrieval.devices import copy_to_all, data_mesh
from msba_jax.training.experiment import ContextDropout
from msba_jax.training.load import load_experiment
from msba_jax.training.mesh import global_batch, host_copy
from msba_jax.training.optimizer import make_optimizer
from msba_jax.training.state import create_state
from msba_jax.training.step import compile_step, make_step

KINDS = {
  'batch': ContextDropout(solo=0.0, memory=0.0),
  'memory': ContextDropout(solo=0.0, memory=1.0),
  'solo': ContextDropout(solo=1.0, memory=0.0),
}


class Stepper:
  """A compiled step that goes on from its own state."""

  def __init__(self, experiment, batch, mesh):
    optimizer = make_optimizer(experiment.optimizer, steps=experiment.steps)
    state = create_state(experiment, optimizer, batch['image'][:1])
    self.state = copy_to_all(host_copy(state), mesh)
    self.batch = global_batch(mesh, batch, size=len(batch['label']))
    step = compile_step(make_step(experiment, optimizer), mesh)
    self.step = step.lower(self.state, self.batch).compile()
    analysis = self.step.memory_analysis()
    self.memory = analysis.temp_size_in_bytes
    self.seconds = []

  def run(self):
    """Times one step more."""
    start = time.perf_counter()
    self.state, metrics = self.step(self.state, self.batch)
    jax.block_until_ready(metrics)
    self.seconds.append(time.perf_counter() - start)


class Embedding:
  """The compiled model without a context."""

  def __init__(self, experiment, batch, mesh):
    del mesh
    images = normalize_image(
      batch['image'], mean=experiment.mean, std=experiment.std
    )
    variables = jax.jit(experiment.model.init)(jax.random.key(0), images[:1])

    def embed(variables, images):
      return experiment.model.apply(variables, images)[0]

    self.step = jax.jit(embed).lower(variables, images).compile()
    self.given = variables, images
    self.memory = self.step.memory_analysis().temp_size_in_bytes
    self.seconds = []

  def run(self):
    """Times one batch."""
    start = time.perf_counter()
    jax.block_until_ready(self.step(*self.given))
    self.seconds.append(time.perf_counter() - start)


def noise(experiment):
  """A batch of random images, classes in groups."""
  size, n = experiment.data.size, experiment.batch_size
  rng = np.random.default_rng(0)
  return {
    'image': rng.integers(0, 256, (n, size, size, 3), np.uint8),
    'label': np.repeat(
      np.arange(experiment.classes_per_batch, dtype=np.int32),
      experiment.images_per_class,
    ),
    'index': np.arange(n, dtype=np.int32),
    'valid': np.ones(n, bool),
  }


def made(kind, experiment, mesh):
  """What is timed: steps of one kind, or the embedding."""
  if kind == 'embed':
    return Embedding(experiment, noise(experiment), mesh)
  changed = dataclasses.replace(experiment, context_dropout=KINDS[kind])
  return Stepper(changed, noise(experiment), mesh)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('experiments', nargs='+')
  parser.add_argument('--repeats', type=int, default=20)
  options, overrides = parser.parse_known_args()
  experiments = [load_experiment(x, overrides) for x in options.experiments]
  mesh = data_mesh(jax.devices()[:1])
  total = dict.fromkeys((x.name for x in experiments), 0.0)
  looks = any(getattr(x.model, 'contextual', False) for x in experiments)
  for kind in ('embed', *KINDS) if looks else ('embed', 'solo'):
    steppers = {x.name: made(kind, x, mesh) for x in experiments}
    for _ in range(options.repeats + 1):
      for stepper in steppers.values():
        stepper.run()
    first = None
    for x in experiments:
      stepper = steppers[x.name]
      seconds = statistics.median(stepper.seconds[1:])
      first = first or (seconds, stepper.memory)
      share = {
        'embed': 0,
        'memory': x.context_dropout.memory,
        'solo': x.context_dropout.solo,
      }.get(kind, 1 - x.context_dropout.memory - x.context_dropout.solo)
      total[x.name] += share * seconds
      print(
        f'{kind:6} {x.name:28} {1e3 * seconds:7.1f} ms '
        f'{seconds / first[0]:5.2f} × {stepper.memory / 2**20:7.1f} MiB '
        f'{stepper.memory / first[1]:5.2f} ×'
      )
  base = total[experiments[0].name]
  for name, seconds in total.items() if looks else ():
    print(f'mean   {name:28} {1e3 * seconds:7.1f} ms {seconds / base:5.2f} ×')


if __name__ == '__main__':
  main()
