"""Exact search against NumPy, and embedding against the bare compiled model.

    python benchmarks/search.py [--queries 1000] [--gallery 200000]

Both halves of a comparison run in this process on the same arrays, in turn;
what counts is the ratio of their best times. NumPy's half of the search is a
matrix product and `argpartition`, in blocks of queries so that its scores fit
in memory. The bare half of embedding is the compiled model on one batch that
lies on the device already: what is missing to it is reading, copying, and
waiting.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from msba_jax.models.backbones.conv import VARIANTS, ConvNet
from msba_jax.models.context import solo
from msba_jax.models.msba import msba
from msba_jax.retrieval.devices import local_mesh, spread
from msba_jax.retrieval.embed import ArraySource, Embedder, embed
from msba_jax.retrieval.search import search


def unit_vectors(rng, number, size):
  drawn = rng.standard_normal((number, size), np.float32)
  return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def search_numpy(queries, gallery, k, rows=100):
  """The same answer by a matrix product and a partition."""
  found = []
  for start in range(0, len(queries), rows):
    scores = queries[start : start + rows] @ gallery.T
    best = np.argpartition(scores, -k, axis=1)[:, -k:]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
    found.append(np.take_along_axis(best, order, axis=1))
  return np.concatenate(found)


def timed(function, *arguments):
  start = time.perf_counter()
  result = function(*arguments)
  return time.perf_counter() - start, result


def measure_embedding(images, batch_size=256):
  """Images a second of `embed`, and of the model alone."""
  model = msba(ConvNet(VARIANTS['pico']))
  init = jax.jit(model.init)
  params = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
  embedder = Embedder(model, params, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
  rng = np.random.default_rng(0)
  source = ArraySource(rng.integers(0, 256, (images, 32, 32, 3), np.uint8))
  mesh = local_mesh()
  batch = spread(
    np.stack([source[i]['image'] for i in range(batch_size)]), mesh
  )

  def bare():
    for _ in range(images // batch_size):
      result = embedder.compiled(
        embedder.variables, batch, solo, keep_regions=False
      )
    jax.block_until_ready(result)

  def ours():
    embed(embedder, source, batch_size=batch_size, mesh=mesh, progress=False)

  times = {ours: [], bare: []}
  for function in (ours, bare, ours, bare, ours, bare):
    times[function].append(timed(function)[0])
  return images / min(times[ours]), images / min(times[bare])


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--queries', type=int, default=1000)
  parser.add_argument('--gallery', type=int, default=200_000)
  parser.add_argument('--size', type=int, default=128)
  parser.add_argument('-k', type=int, default=50)
  parser.add_argument('--repeats', type=int, default=2)
  parser.add_argument('--images', type=int, default=1024)
  options = parser.parse_args()
  rng = np.random.default_rng(0)
  gallery = unit_vectors(rng, options.gallery, options.size)
  queries = unit_vectors(rng, options.queries, options.size)
  warm, found = timed(search, queries, gallery, options.k)
  ours, theirs = [], []
  for _ in range(options.repeats):
    ours.append(timed(search, queries, gallery, options.k)[0])
    seconds, expected = timed(search_numpy, queries, gallery, options.k)
    theirs.append(seconds)
  same = (found.indices == expected).mean()
  best, other = min(ours), min(theirs)
  device = jax.devices()[0]
  print(
    f'{options.queries:,} queries in {options.gallery:,} x {options.size}, '
    f'k = {options.k}, on {len(jax.devices())} {device.platform} device(s)'
  )
  print(f'first call, with compilation: {warm:.2f} s')
  print(f'search: {best:.3f} s, {options.queries / best:,.0f} queries/s')
  print(f'NumPy:  {other:.3f} s, {options.queries / other:,.0f} queries/s')
  print(f'ratio NumPy / search: {other / best:.2f}; equal places: {same:.4%}')
  speed, bare = measure_embedding(options.images)
  print(f'embed:  {speed:,.0f} images/s of 32x32, a small MSBA')
  print(
    f'model:  {bare:,.0f} images/s; ratio embed / model: {speed / bare:.2f}'
  )


if __name__ == '__main__':
  main()
