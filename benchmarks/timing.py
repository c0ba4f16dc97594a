"""Interleaved timing: what a ratio in `docs/performance.md` is made of."""

import os
import platform
import re
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np


def machine() -> str:
  """The processor, its cores, and the versions of what is compared."""
  name = platform.processor()
  try:
    with open('/proc/cpuinfo') as info:
      found = re.search(r'model name\s*:\s*(.*)', info.read())
      name = found[1] if found else name
  except OSError:
    pass
  device = jax.devices()[0]
  return (
    f'{name}, {os.cpu_count()} cores; {len(jax.devices())} device(s) '
    f'{device.device_kind}; Python {platform.python_version()}, JAX '
    f'{jax.__version__}, NumPy {np.__version__}'
  )


def with_gradient(function: Callable) -> Callable:
  """The result, and gradients for the first argument as its cotangent."""

  def both(first, *others):
    result, pull = jax.vjp(function, first, *others)
    return result, pull(first)

  return both


def interleaved(
  functions: dict[str, Callable[[], object]],
  repeats: int,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
  """Seconds of every function, called in turn after one call to warm up."""
  for function in functions.values():
    jax.block_until_ready(function())
  times = {name: [] for name in functions}
  for _ in range(repeats):
    for name, function in functions.items():
      start = clock()
      jax.block_until_ready(function())
      times[name].append(clock() - start)
  return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> str:
  """Time of `slow` over time of `fast`: of the minima, and of the medians."""
  least = min(times[slow]) / min(times[fast])
  middle = statistics.median(times[slow]) / statistics.median(times[fast])
  return f'{least:.2f} x (min), {middle:.2f} x (median)'


def show(title: str, times: dict[str, list[float]], ours: str) -> None:
  """Prints all times, and the ratio of every other one to ours."""
  print(title)
  for name, seconds in times.items():
    line = (
      f'  {name:24s} {1e3 * min(seconds):9.2f} ms (min) '
      f'{1e3 * statistics.median(seconds):9.2f} ms (median)'
    )
    if name != ours:
      line += f'   {name} / {ours}: {ratio(times, name, ours)}'
    print(line)
