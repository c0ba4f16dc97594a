r"""Exact nearest neighbours against `lax.top_k`, NumPy and FAISS.

    python benchmarks/nearest.py [--queries 10000] [--repeats 20]

All run in this process on the same vectors, in turn, and what counts are the
ratios of the least and of the median times. `top_k` is a compiled loop over
blocks of queries with `lax.top_k` over their scores; NumPy's half is a matrix
product and `argpartition`, in blocks of queries too. FAISS is `IndexFlatIP`,
if `faiss-cpu` is installed. On a machine with other work, processor seconds on
one core tell more than the clock:

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 taskset -c 0 \
        python benchmarks/nearest.py --queries 1024 --processor-time
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, machine

from msba_jax.layers.nearest import exact_topk, inner_products

try:
  import faiss
except ImportError:
  faiss = None


@functools.partial(jax.jit, static_argnames=('k', 'rows'))
def search_top_k(queries, gallery, k, rows=512):
  """`lax.top_k` over the scores of a block of queries after another."""
  missing = -len(queries) % rows
  blocks = jnp.pad(queries, ((0, missing), (0, 0)))
  scores, indices = jax.lax.map(
    lambda block: jax.lax.top_k(inner_products(block, gallery), k),
    blocks.reshape(-1, rows, queries.shape[1]),
  )
  count = len(queries)
  return scores.reshape(-1, k)[:count], indices.reshape(-1, k)[:count]


def search_numpy(queries, gallery, k, rows=128):
  """The same answer by a matrix product and a partition."""
  found = []
  for start in range(0, len(queries), rows):
    scores = queries[start : start + rows] @ gallery.T
    best = np.argpartition(scores, -k, axis=1)[:, -k:]
    best_scores = np.take_along_axis(scores, best, axis=1)
    order = np.argsort(-best_scores, axis=1)
    found.append(np.take_along_axis(best, order, axis=1))
  return None, np.concatenate(found)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--queries', type=int, default=10_000)
  parser.add_argument('--gallery', type=int, default=100_000)
  parser.add_argument('--size', type=int, default=256)
  parser.add_argument('-k', type=int, nargs='+', default=[10, 100])
  parser.add_argument('--repeats', type=int, default=20)
  parser.add_argument('--without', nargs='*', default=[])
  parser.add_argument('--processor-time', action='store_true')
  options = parser.parse_args()
  clock = time.process_time if options.processor_time else time.perf_counter
  print(
    f'{machine()}, '
    + (f'FAISS {faiss.__version__}' if faiss else 'FAISS left out: no faiss')
  )
  print(
    f'{options.queries:,} queries in {options.gallery:,} x {options.size} '
    f'float32, {options.repeats} repeats in turn, '
    + ('processor seconds' if options.processor_time else 'seconds')
  )
  rng = np.random.default_rng(0)
  queries, gallery = (
    rng.standard_normal((number, options.size), np.float32)
    for number in (options.queries, options.gallery)
  )
  on_device = jnp.asarray(queries), jnp.asarray(gallery)
  for k in options.k:
    searches = {
      'exact_topk': functools.partial(exact_topk, *on_device, k),
      'top_k': functools.partial(search_top_k, *on_device, k),
      'NumPy': functools.partial(search_numpy, queries, gallery, k),
    }
    if faiss:
      index = faiss.IndexFlatIP(options.size)
      index.add(gallery)
      searches['FAISS'] = functools.partial(index.search, queries, k)
    searches = {
      name: search
      for name, search in searches.items()
      if name not in options.without
    }
    found = np.asarray(searches['exact_topk']()[1])
    times = interleaved(searches, options.repeats, clock)
    ours = times['exact_topk']
    for name, theirs in times.items():
      same = (np.asarray(searches[name]()[1]) == found).mean()
      print(
        f'k = {k:3}  {name:10}  least {min(theirs):8.3f} s  '
        f'median {statistics.median(theirs):8.3f} s  '
        f'ratio {min(theirs) / min(ours):5.2f} (least) '
        f'{statistics.median(theirs) / statistics.median(ours):5.2f} (median)'
        f'  equal places {same:.4%}'
      )


if __name__ == '__main__':
  main()
