"""Attention inside windows and stripes against our own dense attention.

    python benchmarks/windows.py [--grid 56] [--repeats 20]

The ideal is the ratio of the scores that are computed. `mask` is attention over
the whole grid under a mask, `roll` the formulation of Swin: the grid is rolled,
cut into windows, attended under a mask and rolled back. All run in this process
on the same numbers, in turn.
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, machine, ratio

from msba_jax.layers import attend
from msba_jax.layers.window_attention import attend_windows
from msba_jax.layers.windows import Windows, sliding_windows, stripe_windows


def of_windows(windows):
  return lambda *given: attend_windows(*given, windows)


def of_mask(windows):
  """The whole grid, with a mask of the pairs that share a window."""
  member = np.zeros((windows.tokens, len(windows.indices)), bool)
  for i, (indices, valid) in enumerate(
    zip(windows.indices, windows.valid, strict=True)
  ):
    member[indices[valid], i] = True
  mask = jnp.asarray((member.astype(np.float32) @ member.T) > 0)
  return lambda *given: attend(*given, mask=mask[None, None])


def regions(size, window, shift):
  """A number for each part of a rolled side that was apart before."""
  place = np.arange(size)
  return (place >= size - window).astype(int) + (place >= size - shift)


def shifted_windows(size, window, shift):
  """The windows of the rolled grid as tokens; each part is one of its own."""
  rolled = np.roll(
    np.arange(size**2).reshape(size, size), (-shift, -shift), (0, 1)
  )
  side = regions(size, window, shift)
  part = side[:, None] * 3 + side[None]
  cut = np.arange(size) // window
  cell = (cut[:, None] * len(cut) + cut[None]) * 9 + part
  cells = [rolled[cell == i] for i in np.unique(cell)]
  indices = np.zeros((len(cells), window**2), np.int32)
  valid = np.zeros(indices.shape, bool)
  for i, tokens in enumerate(cells):
    indices[i, : len(tokens)] = tokens
    valid[i, : len(tokens)] = True
  return Windows(indices, valid, size**2)


def roll_mask(size, window, shift):
  """Which tokens of every window of the rolled grid may look at which."""
  side = regions(size, window, shift)
  part = (side[:, None] * 3 + side[None]).reshape(-1)
  parts = part[
    sliding_windows(size, size, window=window, stride=window).indices
  ]
  return parts[:, :, None] == parts[:, None]


def of_roll(size, window, shift):
  """Roll, windows, mask, windows back, roll back, as Swin does."""
  mask = jnp.asarray(roll_mask(size, window, shift))[None, :, None]
  count = size // window

  def rolled(queries, keys, values):
    n, _, h, d = queries.shape

    def cut(x):
      x = jnp.roll(x.reshape(n, size, size, h, d), (-shift, -shift), (1, 2))
      x = x.reshape(n, count, window, count, window, h, d)
      return jnp.swapaxes(x, 2, 3).reshape(n, count**2, window**2, h, d)

    x = attend(cut(queries), cut(keys), cut(values), mask=mask)
    x = x.reshape(n, count, count, window, window, h, d)
    x = jnp.swapaxes(x, 2, 3).reshape(n, size, size, h, d)
    return jnp.roll(x, (shift, shift), (1, 2)).reshape(n, -1, h, d)

  return rolled


def of_sheared_roll(size, stripe):
  """Antidiagonal stripes: every row is rolled by its number, columns are cut.

  A column of the sheared grid is an antidiagonal, so that no mask is needed
  where the stripe divides.
  """

  def rolled(queries, keys, values):
    n, _, h, d = queries.shape

    def shear(x, sign):
      x = x.reshape(n, size, size, h, d)
      rows = [jnp.roll(x[:, i], sign * i, 1) for i in range(size)]
      return jnp.stack(rows, axis=1)

    def cut(x):
      x = shear(x, 1).reshape(n, size, size // stripe, stripe, h, d)
      return jnp.swapaxes(x, 1, 2).reshape(n, -1, size * stripe, h, d)

    x = attend(cut(queries), cut(keys), cut(values))
    x = x.reshape(n, size // stripe, size, stripe, h, d)
    x = jnp.swapaxes(x, 1, 2).reshape(n, size, size, h, d)
    return shear(x, -1).reshape(n, -1, h, d)

  return rolled


def scores(windows):
  """Share of all pairs of tokens that are computed."""
  return windows.indices.shape[1] * windows.indices.size / windows.tokens**2


def against_dense(given, options):
  size = options.grid
  plans = {
    f'{direction} {stripe}': stripe_windows(
      size, size, direction=direction, stripe=stripe
    )
    for direction in ('horizontal', 'vertical', 'diagonal')
    for stripe in options.stripes
  }
  for window in options.windows:
    plans[f'windows {window} x {window}'] = sliding_windows(
      size, size, window=window, stride=window
    )
  functions = {'dense': attend}
  functions |= {name: of_windows(plan) for name, plan in plans.items()}
  times = interleaved(compiled(functions, given), options.repeats)
  dense = times.pop('dense')
  print(f'dense: {1e3 * min(dense):.2f} ms (min)')
  print(f'{"":18s} {"ms (min)":>9s} {"time":>8s} {"FLOPs":>8s}   share of it')
  for name, seconds in times.items():
    ideal = 1 / scores(plans[name])
    least = min(dense) / min(seconds)
    middle = statistics.median(dense) / statistics.median(seconds)
    print(
      f'{name:18s} {1e3 * min(seconds):9.2f} {least:6.1f} x {ideal:6.1f} x '
      f'  {least / ideal:.0%} (min), {middle / ideal:.0%} (median)'
    )


def against_masks(given, options):
  size = options.grid
  for stripe in options.stripes:
    windows = stripe_windows(
      size, size, direction='antidiagonal', stripe=stripe
    )
    functions = {'ours': of_windows(windows), 'mask': of_mask(windows)}
    if size % stripe == 0:
      functions['roll'] = of_sheared_roll(size, stripe)
    compare(f'antidiagonal {stripe}', functions, given, options.repeats)
  for window in options.windows:
    if size % window:
      continue
    windows = shifted_windows(size, window, window // 2)
    functions = {
      'ours': of_windows(windows),
      'mask': of_mask(windows),
      'roll': of_roll(size, window, window // 2),
    }
    title = f'shifted windows {window} x {window}'
    compare(title, functions, given, options.repeats)


def compare(title, functions, given, repeats):
  first, *others = compiled(functions, given).values()
  expected = first()
  for other in others:
    np.testing.assert_allclose(other(), expected, atol=1e-4)
  times = interleaved(compiled(functions, given), repeats)
  for name in list(functions)[1:]:
    print(f'{title}: {name} / ours: {ratio(times, name, "ours")}')


def compiled(functions, given):
  return {
    name: functools.partial(jax.jit(function), *given)
    for name, function in functions.items()
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--images', type=int, default=1)
  parser.add_argument('--grid', type=int, default=56)
  parser.add_argument('--heads', type=int, default=8)
  parser.add_argument('--features', type=int, default=64, help='of a head')
  parser.add_argument('--stripes', type=int, nargs='*', default=[1, 2, 4, 7, 8])
  parser.add_argument('--windows', type=int, nargs='*', default=[7, 14])
  parser.add_argument('--repeats', type=int, default=20)
  options = parser.parse_args()
  rng = np.random.default_rng(0)
  shape = options.images, options.grid**2, options.heads, options.features
  given = [
    jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(3)
  ]
  print(machine())
  print(
    f'{options.images} image(s) of {options.grid} x {options.grid} tokens, '
    f'{options.heads} heads x {options.features}, {options.repeats} repeats in '
    'turn'
  )
  against_dense(given, options)
  against_masks(given, options)


if __name__ == '__main__':
  main()
