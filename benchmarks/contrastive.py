"""Contrastive losses over a ring of devices, against gathered embeddings.

    python benchmarks/contrastive.py [--images 16384] [--size 128]

Value and gradients of both losses on eight host devices, twice: by the ring,
and by gathering all embeddings on every device, which then holds a row of
scores of the whole batch for each of its images and differentiates as JAX does.
Both run in this process on the same arrays, in turns; what counts is the ratio
of their times and of the temporary memory of their compiled programs.
"""

import argparse
import os
import statistics

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from timing import interleaved, machine

from msba_jax.losses.reduction import masked_log_sum_exp
from msba_jax.losses.sharded import ring_nt_xent, ring_supervised_contrastive
from msba_jax.losses.similarity import cosine_similarities, unit_vectors

AXIS = 'data'


def gathered(embeddings, labels, temperature):
  """Scores of local images and all images, and which pairs are which."""
  units = unit_vectors(embeddings)
  everyone = jax.lax.all_gather(units, AXIS, tiled=True)
  scores = cosine_similarities(units, everyone) / temperature
  all_labels = jax.lax.all_gather(labels, AXIS, tiled=True)
  first = jax.lax.axis_index(AXIS) * len(labels)
  own = first + jnp.arange(len(labels))
  different = own[:, None] != jnp.arange(len(all_labels))[None, :]
  same = labels[:, None] == all_labels[None, :]
  return scores, same & different, ~same


def gathered_supervised(embeddings, labels, temperature):
  scores, positive, negative = gathered(embeddings, labels, temperature)
  normalizer, _ = masked_log_sum_exp(scores, positive | negative)
  surprise = jnp.where(positive, normalizer[:, None] - scores, 0)
  return surprise.sum(-1) / jnp.maximum(positive.sum(-1), 1)


def gathered_nt_xent(embeddings, labels, temperature):
  scores, positive, negative = gathered(embeddings, labels, temperature)
  others, opposed = masked_log_sum_exp(scores, negative)
  losses = jax.nn.softplus(others[:, None] - scores)
  return jnp.where(positive & opposed[:, None], losses, 0).sum(-1)


def compiled(loss, mesh, arrays):
  """Mean of a loss and its gradients, ahead of time."""
  shards = PartitionSpec(AXIS)
  sharded = jax.shard_map(
    loss,
    mesh=mesh,
    in_specs=(shards, shards, PartitionSpec()),
    out_specs=shards,
  )

  def mean(embeddings, labels, temperature):
    return sharded(embeddings, labels, temperature).mean()

  step = jax.jit(jax.value_and_grad(mean, argnums=(0, 2)))
  return step.lower(*arrays).compile()


def compare(name, ring, dense, mesh, arrays, repeats):
  steps = [compiled(loss, mesh, arrays) for loss in (ring, dense)]
  results = [jax.tree.leaves(step(*arrays)) for step in steps]
  differences = [
    float(jnp.max(jnp.abs(x - y))) / max(float(jnp.max(jnp.abs(y))), 1e-30)
    for x, y in zip(*results, strict=True)
  ]
  memory = [x.memory_analysis().temp_size_in_bytes for x in steps]
  times = interleaved(
    {
      'ring': lambda: steps[0](*arrays),
      'gathered': lambda: steps[1](*arrays),
    },
    repeats,
  )
  seconds = times['ring'], times['gathered']
  ratios = [x / y for x, y in zip(*seconds, strict=True)]
  print(name)
  print(
    f'  temporary memory a device: ring {memory[0] / 2**20:.2f} MiB, gathered '
    f'{memory[1] / 2**20:.2f} MiB, 1/{memory[1] / memory[0]:.1f}'
  )
  print(
    f'  seconds, least of {repeats}: ring {min(seconds[0]):.3f}, gathered '
    f'{min(seconds[1]):.3f}'
  )
  print(
    f'  ring / gathered: {min(seconds[0]) / min(seconds[1]):.3f} of the least, '
    f'{statistics.median(ratios):.3f} median of the turns'
  )
  print(
    '  largest difference of value, gradient by embeddings, by temperature, '
    'relative: ' + ', '.join(f'{x:.1e}' for x in differences)
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--images', type=int, default=16_384)
  parser.add_argument('--size', type=int, default=128)
  parser.add_argument('--images-per-class', type=int, default=4)
  parser.add_argument('--chunk', type=int, default=256)
  parser.add_argument('--repeats', type=int, default=20)
  options = parser.parse_args()
  devices = jax.devices()
  if options.images % len(devices):
    parser.error(f'--images must be a multiple of {len(devices)}')
  mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,))
  rng = np.random.default_rng(0)
  vectors = rng.standard_normal((options.images, options.size), np.float32)
  labels = rng.permutation(options.images) // options.images_per_class
  shards = NamedSharding(mesh, PartitionSpec(AXIS))
  arrays = (
    jax.device_put(vectors, shards),
    jax.device_put(labels.astype(np.int32), shards),
    jax.device_put(np.float32(0.1), NamedSharding(mesh, PartitionSpec())),
  )
  print(machine())
  print(
    f'{options.images:,} × {options.size} float32 on {len(devices)} host '
    f'devices, {options.images_per_class} images a class, chunks of '
    f'{options.chunk}'
  )

  def supervised(embeddings, labels, temperature):
    return ring_supervised_contrastive(
      embeddings,
      labels,
      axis_name=AXIS,
      temperature=temperature,
      chunk=options.chunk,
    )

  def paired(embeddings, labels, temperature):
    return ring_nt_xent(
      embeddings,
      labels,
      axis_name=AXIS,
      temperature=temperature,
      chunk=options.chunk,
    ).losses

  for name, ring, dense in (
    ('supervised_contrastive', supervised, gathered_supervised),
    ('nt_xent', paired, gathered_nt_xent),
  ):
    compare(name, ring, dense, mesh, arrays, options.repeats)


if __name__ == '__main__':
  main()
