"""What the choices of trained NEXUS runs are worth.

    python benchmarks/nexus_choices.py RUN [RUN ...] [--shuffles 10]

RUNs are trainings of `experiments/scenes_nexus.py` or `fine_nexus.py` with
different seeds. Three questions, each answered with an interval of 95 % over
runs and images:

1. Do widths of stripes and kept shares differ between plain and crowded ones?
   And how much among the images of a run: the last column, the mean over runs.
2. Does retrieval suffer when each image gets the choices of another one: how
   wide and how many, which regions, or both? Mean of `--shuffles` assignments,
   on `--classes` unseen classes, as many scenes of each as the test has.
3. How near is the output of sparse attention to that of dense attention with
   the same parameters and inputs, and at which kept share? How much of the
   dense attention remains by what is kept and by the means of the rest, and how
   much would if as many regions were chosen for this?

Images are embedded alone (`solo`). Those of 1 and 2 are drawn test scenes.
"""

import argparse
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from unseen_classes import BATCH, batches, row, scored, test_scenes

from msba_jax.data.prefetch import load_batch
from msba_jax.data.scenes.config import PRESETS
from msba_jax.layers.block_choice import block_mask
from msba_jax.metrics import (
  bootstrap_interval,
  fidelity,
  paired_bootstrap,
)
from msba_jax.models.context import solo
from msba_jax.models.sparse_attention import SparseAttention
from msba_jax.training.run import load_run


def told(run, source):
  """By name, what each image's modules decided: (images, levels)."""

  @jax.jit
  def tell(variables, images):
    _, out = run.embedder.apply(variables, images, solo)
    aux = out['aux']['msw']
    return {'width': aux['stripe'].T, 'kept': aux['kept'].T}

  found = [
    tell(run.embedder.variables, batch['image']) for batch in batches(source)
  ]
  return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def drawn_scenes(run, preset):
  """Test scenes with the appearance of a preset, in the size of the run."""
  data, knobs = run.experiment.data, PRESETS[preset]
  names = ('least_objects', 'most_objects', 'occlusion', 'view_jitter', 'noise')
  changed = {name: getattr(knobs, name) for name in names}
  return dataclasses.replace(data, **changed).open().test.queries


def plain_and_crowded(runs):
  """Question 1."""
  print('## Plain and crowded scenes\n')
  found = {
    preset: [told(run, drawn_scenes(run, preset)) for run in runs]
    for preset in ('plain', 'crowded')
  }
  print('| choice | level | plain | crowded | crowded − plain | deviation |')
  print('|---|---|---|---|---|---|')
  for name in ('width', 'kept'):
    levels = found['plain'][0][name].shape[1]
    for level in range(levels):
      plain, crowded = (
        np.stack([one[name][:, level] for one in of_runs]).astype(np.float64)
        for of_runs in found.values()
      )
      spread = np.std(np.concatenate([plain, crowded], axis=1), axis=1)
      cells = [
        bootstrap_interval(plain, seed=0),
        bootstrap_interval(crowded, seed=0),
        paired_bootstrap(crowded, plain, seed=0),
      ]
      row((name, str(level)), cells, 3, f'{np.mean(spread):.3f}')


# What a shuffle exchanges: outputs of modules by name, of methods by name.
SIZES, REGIONS = {'width', 'ratio'}, {'_best_regions'}
SHUFFLES = {
  'how wide and how many': SIZES,
  'which regions': REGIONS,
  'both': SIZES | REGIONS,
}


def shuffled_model(run, exchanged):
  """`(variables, images, order) → vectors`: image i chooses as `order[i]`."""

  @jax.jit
  def apply(variables, images, order):
    def shuffle(forward, arguments, options, context):
      value = forward(*arguments, **options)
      # A module is known by its name where it is called as a whole.
      name = context.method_name
      if name == '__call__':
        name = context.module.name
      return value[order] if name in exchanged else value

    with nn.intercept_methods(shuffle):
      return run.embedder.apply(variables, images, solo)[0]

  return apply


def precision(run, apply, source, key=None):
  """AP of every image; with a key, by choices of others of its batch."""

  def embed(images, number):
    order = jnp.arange(BATCH)
    if key is not None:
      order = jax.random.permutation(jax.random.fold_in(key, number), BATCH)
    return apply(run.embedder.variables, images, order)

  scores, labels = scored(source, embed)
  return scores['ap'], labels


def exchanged(runs, shuffles, classes):
  """Question 2."""
  print('\n## Choices of other images\n')
  print('| of others | mAP, own choices | of others | difference |')
  print('|---|---|---|---|')
  own, labels = [], None
  for run in runs:
    source = test_scenes(run.experiment.data, classes)
    values, labels = precision(run, shuffled_model(run, set()), source)
    own.append(100 * values)
  own = np.stack(own)
  for name, parts in SHUFFLES.items():
    others = []
    for run in runs:
      apply = shuffled_model(run, parts)
      source = test_scenes(run.experiment.data, classes)
      keys = map(jax.random.key, range(shuffles))
      found = [precision(run, apply, source, key)[0] for key in keys]
      others.append(100 * np.mean(found, axis=0))
    others = np.stack(others)
    cells = [
      bootstrap_interval(own, groups=labels, seed=0),
      bootstrap_interval(others, groups=labels, seed=0),
      paired_bootstrap(others, own, groups=labels, seed=0),
    ]
    row((name,), cells, 2)


def remaining(seen, blocks):
  """Of dense attention, what remains with chosen regions, and the best."""
  masses, of_means = (np.asarray(x, np.float64).sum(axis=-1) for x in seen)
  mask = np.asarray(block_mask(blocks, masses.shape[-1]))
  best = np.argsort(np.argsort(of_means - masses, axis=-1), axis=-1)
  best = best < mask.sum(axis=-1, keepdims=True)
  return [
    np.where(chosen, masses, of_means).sum(axis=-1).mean(axis=(1, 2))
    for chosen in (mask, best)
  ]


def against_dense(runs):
  """Question 3."""
  print('\n## Sparse beside dense, the same parameters\n')
  print(
    '| level | kept | cosine | relative L1 | RMSE | remains | of the best |'
  )
  print('|---|---|---|---|---|---|---|')
  rows = {}
  for run in runs:
    images = load_batch(
      run.experiment.data.open().test.queries, np.arange(BATCH)
    )
    found = {}

    def note(forward, arguments, options, context, found=found):
      module, value = context.module, forward(*arguments, **options)
      if isinstance(module, SparseAttention):
        noted = found.setdefault('/'.join(module.path), {})
        noted[context.method_name] = arguments, value
        noted['twin'] = module.clone(parent=None, name=None)
        noted['variables'] = {'params': module.variables['params']}
      return value

    with nn.intercept_methods(note):
      run.embedder.apply(run.embedder.variables, images['image'], solo)
    for path, noted in found.items():
      if '_seen' not in noted:
        continue  # Attends densely.
      arguments, (sparse, aux) = noted['__call__']
      dense, _ = (
        noted['twin'].clone(dense=True).apply(noted['variables'], *arguments)
      )
      distance = fidelity(np.asarray(sparse), np.asarray(dense))
      remains = remaining(noted['_seen'][1], aux['blocks'])
      rows.setdefault(path, []).append(
        np.stack([np.asarray(aux['kept'], np.float64), *distance, *remains])
      )
  for path, of_runs in rows.items():
    cells = [
      bootstrap_interval(values, seed=0) for values in np.stack(of_runs, axis=1)
    ]
    row((path,), cells, 3)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('runs', nargs='+', metavar='RUN')
  parser.add_argument('--shuffles', type=int, default=1)
  parser.add_argument('--classes', type=int)
  options = parser.parse_args()
  runs = [load_run(run) for run in options.runs]
  plain_and_crowded(runs)
  exchanged(runs, options.shuffles, options.classes)
  against_dense(runs)


if __name__ == '__main__':
  main()
