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

MOST_DEVICES = 16
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + f' --xla_force_host_platform_device_count={MOST_DEVICES}'
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from timing import interleaved, machine, show, with_gradient  # noqa: E402

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
  return jax.jit(attend_fn)


def gradient(attend_fn):
  return jax.jit(with_gradient(attend_fn))


def draw(images, heads, features, mesh):
  rows = jax.sharding.NamedSharding(mesh, ROWS)
  rng = np.random.default_rng(0)
  return [
    jax.device_put(
      rng.standard_normal((images, heads, features), np.float32), rows
    )
    for _ in range(3)
  ]


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
  for title, kind in (('forward', forward), ('forward and backward', gradient)):
    compiled = {
      name: functools.partial(
        kind(spread(way, options.devices)[1]).lower(*arrays).compile(), *arrays
      )
      for name, way in ways.items()
    }
    results = {name: function() for name, function in compiled.items()}
    for way in list(ways)[1:]:
      off = jax.tree.map(
        lambda x, y: float(jnp.max(jnp.abs(x - y))),
        results['ring'],
        results[way],
      )
      most = max(jax.tree.leaves(off))
      print(f'{title}: ring differs from {way} by at most {most:.1e}')
    show(title, interleaved(compiled, options.repeats), 'ring')


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
  print(machine())
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
