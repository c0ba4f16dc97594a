"""Retrieval of trained runs on more unseen classes of scenes than their test.

    python benchmarks/unseen_classes.py RUN [RUN ...] [--classes 100]

RUNs are trainings of experiments on scenes, each with the same seeds. Twenty
classes leave an interval of several points of mAP, since it is the classes that
differ; more of them are drawn with the same knobs, as many scenes of each. What
is printed is mAP and recall@1 of images alone (`solo`), the mean over the runs
of an experiment, and the paired difference to the first experiment, with
intervals of 95 % over runs, classes and images. Absolute numbers are lower than
on the test, since there is more to confuse.
"""

import argparse
import dataclasses

import jax
import numpy as np

from msba_jax.data.prefetch import load_batch
from msba_jax.metrics import (
  bootstrap_interval,
  evaluate_retrieval,
  paired_bootstrap,
)
from msba_jax.models.context import solo
from msba_jax.training.run import load_run

BATCH = 120
METRICS = 'ap', 'recall@1'


def row(heads, cells, digits, *tail):
  """A line of a table: names, means with their intervals, and what follows."""
  numbers = (
    f'{c.mean:.{digits}f} [{c.low:.{digits}f}, {c.high:.{digits}f}]'
    for c in cells
  )
  print(f'| {" | ".join((*heads, *numbers, *tail))} |', flush=True)


def batches(source):
  """Images of a source, in batches of one size."""
  for start in range(0, len(source) - len(source) % BATCH, BATCH):
    yield load_batch(source, np.arange(start, start + BATCH))


def test_scenes(data, classes):
  """Those of the data, or of so many classes of the test."""
  if classes and classes != data.test_classes:
    data = dataclasses.replace(
      data,
      test_classes=classes,
      test_scenes=classes * (data.test_scenes // data.test_classes),
      # Drawn with them, and not used.
      train_scenes=data.train_classes,
      validation_scenes=data.validation_classes,
    )
  return data.open().test.queries


def scored(source, embed):
  """Scores of every image, and labels; `embed(images, number of the batch)`."""
  vectors, labels = [], []
  for i, batch in enumerate(batches(source)):
    vectors.append(np.asarray(embed(batch['image'], i)))
    labels.append(batch['label'])
  labels = np.concatenate(labels)
  scores = evaluate_retrieval(np.concatenate(vectors), labels)
  return {name: scores[name].astype(np.float64) for name in METRICS}, labels


def of_run(run, source):
  """Scores of a run, images alone."""

  @jax.jit
  def embed(variables, images):
    return run.embedder.apply(variables, images, solo)[0]

  return scored(source, lambda images, _: embed(run.embedder.variables, images))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('runs', nargs='+', metavar='RUN')
  parser.add_argument('--classes', type=int, default=100)
  options = parser.parse_args()
  given = [load_run(path) for path in options.runs]
  first = given[0].experiment.name
  runs = sorted(given, key=lambda run: run.experiment.seed)
  seeds = {first: []}
  for run in runs:
    seeds.setdefault(run.experiment.name, []).append(run.experiment.seed)
  if any(x != seeds[first] or len(set(x)) < len(x) for x in seeds.values()):
    parser.error(f'experiments need one run of each of the same seeds: {seeds}')
  # Runs on the same data see the same scenes, which are drawn once.
  sources, found, labels = {}, {name: [] for name in seeds}, None
  for run in runs:
    data = run.experiment.data
    if data not in sources:
      sources[data] = test_scenes(data, options.classes)
    scores, labels = of_run(run, sources[data])
    found[run.experiment.name].append(scores)
  print('| experiment | mAP, % | recall@1, % | mAP − the first |')
  print('|---|---|---|---|')
  values = {
    name: {
      metric: 100 * np.stack([one[metric] for one in scores])
      for metric in METRICS
    }
    for name, scores in found.items()
  }
  for name, of_metric in values.items():
    cells = [
      bootstrap_interval(x, groups=labels, seed=0) for x in of_metric.values()
    ]
    if name != first:
      cells.append(
        paired_bootstrap(
          of_metric['ap'], values[first]['ap'], groups=labels, seed=0
        )
      )
    row((name,), cells, 2, *[''] * (name == first))


if __name__ == '__main__':
  main()
