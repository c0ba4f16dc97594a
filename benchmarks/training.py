"""Images per second of a training step, and its share spent waiting for data.

    python benchmarks/training.py EXPERIMENT [--steps 100] [overrides]

Trains an experiment for some steps into a temporary directory, as `msba train`
does, and reads what the run itself logged; the first line, in which the step
compiles, is left out. Beside it stands the compiled step alone, on one batch
that lies on the device: what the loop adds to it is the ratio.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import jax
import numpy as np
from steps import Stepper

from msba_jax.data.prefetch import load_batch
from msba_jax.retrieval.devices import data_mesh
from msba_jax.training.fit import plan_indices
from msba_jax.training.load import load_experiment
from msba_jax.training.loop import train
from msba_jax.training.record import read_metrics


def bare_step(experiment, repeats=20):
  """Median seconds of the compiled step on one batch."""
  source = experiment.data.open().train
  batch = load_batch(source, plan_indices(experiment, source)(0))
  arrays = {
    'image': batch['image'],
    'label': batch['label'],
    'index': batch['index'].astype(np.int32),
    'valid': np.ones(experiment.batch_size, bool),
  }
  stepper = Stepper(experiment, arrays, data_mesh(jax.devices()[:1]))
  for _ in range(repeats + 1):
    stepper.run()
  return statistics.median(stepper.seconds[1:])


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('experiment')
  parser.add_argument('--steps', type=int, default=100)
  options, overrides = parser.parse_known_args()
  overrides += ['--steps', str(options.steps), '--log-every', '10']
  overrides += ['--checkpoint-every', str(options.steps)]
  overrides += ['--evaluate-every', '0']
  experiment = load_experiment(options.experiment, overrides)
  with tempfile.TemporaryDirectory() as directory:
    run = Path(directory) / 'run'
    train(experiment, run, devices=jax.devices()[:1])
    rows = read_metrics(run)
  rows = [row for row in rows if row['phase'] == 'train'][1:]
  speed = statistics.median(row['images_per_second'] for row in rows)
  wait = statistics.median(row['data_wait'] for row in rows)
  bare = experiment.batch_size / bare_step(experiment)
  print(f'{experiment.name}: {jax.devices()[0].device_kind}, one device')
  print(f'  {speed:.1f} images/s in training, median of {len(rows)} intervals')
  print(f'  {100 * wait:.2f} % of the time waiting for data')
  print(
    f'  {bare:.1f} images/s of the compiled step alone, ratio '
    f'{speed / bare:.3f}'
  )


if __name__ == '__main__':
  main()
