"""Batches read ahead of the step that wants them.

Grain only prefetches: it maps a range of step numbers to batches with a few
threads and hands them over in order. Its own state is never saved; a run is
resumed by starting at another step. Threads, not processes: sources are not
copied, and Grain's worker processes want command-line flags parsed that are
not ours.

Attributes:
  batches: iterates over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from msba_jax.data.source import Source


def load_batch(source: Source, indices: np.ndarray) -> dict[str, Any]:
  """Reads the given images.

  Args:
    source: where they come from.
    indices: which images, (b,).

  Returns:
    `image` uint8 (b, height, width, 3), or the pytree of arrays that the source
    has in its place; `label` int32 (b,), `index` int64 (b,).

  Raises:
    InputError: an image cannot be decoded.
    ValueError: the images differ in size.
  """
  indices = np.asarray(indices, np.int64)
  pictures = [source[i]['image'] for i in indices.tolist()]
  shapes = {np.shape(jax.tree.leaves(picture)[0]) for picture in pictures}
  if len(shapes) > 1:
    raise ValueError(f'images of a batch differ in shape: {sorted(shapes)}')
  return {
    'image': jax.tree.map(lambda *arrays: np.stack(arrays), *pictures),
    'label': np.asarray(source.labels[indices], np.int32),
    'index': indices,
  }


def batches(
  source: Source,
  plan_of_step: Callable[[int], np.ndarray],
  *,
  start: int,
  stop: int,
  threads: int = 2,
  buffer: int = 4,
) -> Iterator[dict[str, Any]]:
  """Iterates over the batches of the steps start … stop − 1.

  What comes does not depend on `threads` or `buffer`. An error in a batch is
  raised where that batch would have come, after all batches before it.

  Args:
    source: the images.
    plan_of_step: indices of a step's images; called from several threads.
    start: first step.
    stop: step before which to end.
    threads: how many batches are read at once; 0 reads in the caller's thread,
      best where pictures are in memory already.
    buffer: how many batches are read ahead.

  Yields:
    What `load_batch` returns, and the `step`.

  Raises:
    InputError: an image cannot be decoded.
    ValueError: a number is out of its range.
  """
  if not 0 <= start <= stop or threads < 0 or buffer < 0:
    raise ValueError(
      f'{start=} <= {stop=}, {threads=} and {buffer=} must not be negative'
    )
  if start == stop:
    return

  def load(step: int) -> dict[str, Any]:
    return {**load_batch(source, plan_of_step(step)), 'step': int(step)}

  ahead = max(buffer, threads) if threads else 0
  iterator = iter(
    grain.MapDataset.range(start, stop)
    .map(load)
    .to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    )
  )
  try:
    yield from iterator
  finally:
    iterator.close()  # pyright: ignore[reportAttributeAccessIssue]
