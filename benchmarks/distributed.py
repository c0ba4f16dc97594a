"""The ring of devices against gathered keys, on virtual devices of this host.

    python benchmarks/distributed.py [--images 4096] [--devices 8]

Both run in this process on the same arrays, in turn; what counts are ratios of
times, of the best and of the median. Memory is what the compiler plans for the
temporaries of the gradient on one device, in units of one shard of the keys;
there the shard keeps its size, so that the whole grows with the devices.
"""

import argparse
import functools
import os
import platform
import time
from pathlib import Path

MOST_DEVICES = 16
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + f' --xla_force_host_platform_device_count={MOST_DEVICES}'
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from msba_jax.layers.attention import attend  # noqa: E402
from msba_jax.layers.distributed import gathered, ring  # noqa: E402

ROWS = jax.sharding.PartitionSpec('images')


def spread(attend_fn, devices):
  """The function inside `jax.shard_map`, images over the devices."""
  mesh = jax.make_mesh(
    (devices,),
    ('images',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:devices],
  )
  return mesh, jax.shard_map(
    attend_fn, mesh=mesh, in_specs=ROWS, out_specs=ROWS
  )


def forward(attend_fn):
  return jax.jit(lambda q, k, v, cotangent: attend_fn(q, k, v))


def gradient(attend_fn):
  """Messages and the gradients by queries, keys and values."""

  def both(q, k, v, cotangent):
    messages, pull = jax.vjp(attend_fn, q, k, v)
    return messages, pull(cotangent)

  return jax.jit(both)


def draw(images, heads, features, mesh):
  rows = jax.sharding.NamedSharding(mesh, ROWS)
  rng = np.random.default_rng(0)
  return [
    jax.device_put(
      rng.standard_normal((images, heads, features), np.float32), rows
    )
    for _ in range(4)
  ]


def interleaved(functions, arrays, repeats):
  """Seconds of every function, one run of each in turn."""
  times = [[] for _ in functions]
  for _ in range(repeats):
    for function, taken in zip(functions, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(function(*arrays))
      taken.append(time.perf_counter() - start)
  return times


def compare_times(options):
  """Ratios of the ring to both kinds of gathered keys, and agreement."""
  ways = {
    'ring': functools.partial(ring(attend, 'images'), chunk=options.chunk),
    'gathered, chunked': functools.partial(
      gathered(attend, 'images'), implementation='chunked', chunk=options.chunk
    ),
    'gathered, dense': functools.partial(
      gathered(attend, 'images'), implementation='dense'
    ),
  }
  mesh, _ = spread(attend, options.devices)
  arrays = draw(options.images, options.heads, options.features, mesh)
  for name, kind in (('forward', forward), ('forward + backward', gradient)):
    compiled = [
      kind(spread(way, options.devices)[1]).lower(*arrays).compile()
      for way in ways.values()
    ]
    results = [function(*arrays) for function in compiled]
    for way, result in zip(ways, results, strict=True):
      off = [
        float(jnp.max(jnp.abs(x - y)))
        for x, y in zip(
          jax.tree.leaves(results[0]), jax.tree.leaves(result), strict=True
        )
      ]
      if way != 'ring':
        print(f'{name}: ring differs from {way} by at most {max(off):.1e}')
    ours, *others = interleaved(compiled, arrays, options.repeats)
    print(f'{name}: ring {min(ours):.3f} s, median {np.median(ours):.3f} s')
    for way, theirs in zip(list(ways)[1:], others, strict=True):
      print(
        f'{name}: ring / {way}: {min(ours) / min(theirs):.3f} of the best, '
        f'{np.median(ours) / np.median(theirs):.3f} of the median times'
      )


def compare_memory(options):
  """Temporaries of the gradient, in shards, by the number of devices."""
  shard = 4 * options.shard * options.heads * options.features
  for devices in (2, 4, 8, 16):
    taken = []
    for make in (ring, gathered):
      mesh, attend_all = spread(
        functools.partial(
          make(attend, 'images'),
          implementation='chunked',
          chunk=options.memory_chunk,
        ),
        devices,
      )
      images = options.shard * devices
      arrays = draw(images, options.heads, options.features, mesh)
      compiled = gradient(attend_all).lower(*arrays).compile()
      taken.append(compiled.memory_analysis().temp_size_in_bytes / shard)
    print(
      f'gradient on {devices:2} devices: ring {taken[0]:.2f} shards, gathered '
      f'{taken[1]:.2f}, ratio 1/{taken[1] / taken[0]:.1f}'
    )


def processor():
  for line in Path('/proc/cpuinfo').read_text().splitlines():
    if line.startswith('model name'):
      return line.split(':')[1].strip()
  return platform.processor() or platform.machine()


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--images', type=int, default=4096)
  parser.add_argument('--heads', type=int, default=8)
  parser.add_argument('--features', type=int, default=64)
  parser.add_argument('--devices', type=int, default=8)
  parser.add_argument('--repeats', type=int, default=20)
  parser.add_argument('--chunk', type=int, default=None)
  parser.add_argument('--shard', type=int, default=512)
  parser.add_argument('--memory-chunk', type=int, default=128)
  parser.add_argument('--only', choices=('times', 'memory'))
  options = parser.parse_args()
  print(
    f'{processor()}, {os.cpu_count()} cores; Python '
    f'{platform.python_version()}, jax {jax.__version__}, NumPy '
    f'{np.__version__}'
  )
  print(
    f'{options.images} images, {options.heads} heads of {options.features}, '
    f'{options.devices} virtual devices, {options.repeats} repeats; a shard of '
    f'{options.shard} images for memory'
  )
  if options.only != 'times':
    compare_memory(options)
  if options.only != 'memory':
    compare_times(options)


if __name__ == '__main__':
  main()
