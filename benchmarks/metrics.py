"""Mean average precision of 60,000 images among each other, and its memory.

    python benchmarks/metrics.py [--images 60000] [--images-per-class 5]

First all metrics at full size: wall time with compilation, images per second,
and the largest memory of the whole process so far, which must stay under 2 GiB.
Then a smaller size beside NumPy, which sorts every row: both in this process,
in turns, and what counts is the ratio.
"""

import argparse
import resource
import sys
import time

import jax
import numpy as np

from msba_jax.metrics import evaluate_retrieval, summarize

LIMIT_GIB = 2


def clustered(images, size, per_class):
  """Unit vectors around a centre for each class, and their classes."""
  rng = np.random.default_rng(0)
  labels = rng.permutation(np.arange(images) // per_class)
  centres = rng.standard_normal((labels.max() + 1, size), np.float32)
  vectors = rng.standard_normal((images, size), np.float32)
  vectors += centres[labels] / 2
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels


def sorted_by_numpy(vectors, labels, rows=256):
  """The mAP by a matrix product and a full stable sort of each row."""
  precisions = []
  for start in range(0, len(vectors), rows):
    scores = vectors[start : start + rows] @ vectors.T
    own = np.arange(start, start + len(scores))
    scores[np.arange(len(scores)), own] = -np.inf
    order = np.argsort(-scores, axis=1, kind='stable')[:, :-1]
    hits = labels[order] == labels[own, None]
    found = np.cumsum(hits, axis=1)
    precision = found / np.arange(1, hits.shape[1] + 1)
    counts = np.maximum(found[:, -1], 1)
    precisions.append((precision * hits).sum(axis=1) / counts)
  return float(np.concatenate(precisions).mean())


def timed(function, *arguments):
  start = time.perf_counter()
  result = function(*arguments)
  return time.perf_counter() - start, result


def peak_gib():
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / (2**30 if sys.platform == 'darwin' else 2**20)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--images', type=int, default=60_000)
  parser.add_argument('--size', type=int, default=128)
  parser.add_argument('--images-per-class', type=int, default=5)
  parser.add_argument('--small', type=int, default=6000)
  parser.add_argument('--repeats', type=int, default=3)
  options = parser.parse_args()
  shape = f'{options.images:,} × {options.images:,} × {options.size}'
  data = clustered(options.images, options.size, options.images_per_class)
  before = peak_gib()
  seconds, scores = timed(evaluate_retrieval, *data)
  peak = peak_gib()
  print(f'device: {jax.devices()[0].device_kind}')
  print(f'{shape}, {options.images_per_class} images a class')
  print(f'  mAP {summarize(scores)["ap"]:.4f} and all other metrics')
  print(f'  {seconds:.1f} s, {options.images / seconds:,.0f} images/s')
  print(f'  peak memory of the process {peak:.2f} GiB, {before:.2f} before')

  data = clustered(options.small, options.size, options.images_per_class)
  evaluate_retrieval(*data)
  turns = [
    (timed(evaluate_retrieval, *data), timed(sorted_by_numpy, *data))
    for _ in range(options.repeats)
  ]
  ours, theirs = (min(turn[i][0] for turn in turns) for i in range(2))
  values = summarize(turns[0][0][1])['ap'], turns[0][1][1]
  print(f'{options.small:,} images: {ours:.2f} s, NumPy sorting {theirs:.2f} s')
  print(f'  ratio {theirs / ours:.1f}, mAP {values[0]:.6f} and {values[1]:.6f}')
  if peak > LIMIT_GIB:
    sys.exit(f'peak memory {peak:.2f} GiB is over {LIMIT_GIB} GiB')


if __name__ == '__main__':
  main()
