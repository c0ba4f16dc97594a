r"""Deformable attention: a query reads a few points instead of all tokens.

A point is read bilinearly from a grid: from its four corners, where a corner
outside the grid is zero. Forward, rows of the values are gathered; backward,
rows are added to. On a CPU this was ahead of products with a matrix (tokens
asking × tokens read) of the shares, see `benchmarks/deformable.py`.

Attributes:
  deformable_attention: the weighted sum of points of several levels.
  patch_centres: where the patches of a grid stand, the usual references.
  ring_offsets: first offsets of the points, one direction a head.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from msba_jax.layers.varying import varying_alike, varying_like

__all__ = ['deformable_attention', 'patch_centres', 'ring_offsets']


def deformable_attention(
  values: Sequence[Float[Array, 'n _ _ h f']],
  locations: Float[Array, 'n t h l p 2'],
  weights: Float[Array, 'n t h l p'],
) -> Float[Array, 'n t h f']:
  r"""Weighted sum of points: o = Σ_l Σ_p weight · bilinear(V_l, location).

  A location is (x, y) and runs from 0 to 1 over the whole map of any level, so
  that it stands at pixel location · size − ½. Where it stands exactly on a
  pixel, its derivative is the one towards larger x and y. The weights are taken
  as they are; a softmax over levels and points makes this an attention.

  Args:
    values: levels (n, y, x, h, f), each of its own height and width.
    locations: finite; outside of the map values are zero.
    weights: of the points.

  Returns:
    Messages in the dtype of the values, summed in float32. There is a gradient
    but no forward-mode derivative.

  Raises:
    ValueError: the shapes do not fit together, or there is no level.

  Example:
    >>> grid = jnp.array([2.0, 4.0]).reshape(1, 1, 2, 1, 1)
    >>> points = jnp.array([[0.25, 0.5], [0.5, 0.5]]).reshape(1, 2, 1, 1, 1, 2)
    >>> weights = jnp.ones((1, 2, 1, 1, 1))
    >>> deformable_attention([grid], points, weights).ravel().tolist()
    [2.0, 3.0]

  Source: Deformable DETR (2020), arXiv 2010.04159.
  """
  _check(values, locations, weights)
  locations = locations.astype(jnp.float32)
  weights = weights.astype(jnp.float32)
  total = jnp.zeros((*weights.shape[:3], values[0].shape[-1]), jnp.float32)
  for i, level in enumerate(values):
    n, height, width, h, f = level.shape
    places, shares = _corners(
      locations[:, :, :, i], weights[:, :, :, i], height, width
    )
    flat = level.reshape(n, height * width, h, f)
    total = total + _read(*varying_alike(flat, places, shares))
  return total.astype(values[0].dtype)


def patch_centres(height: int, width: int) -> Float[np.ndarray, 't 2']:
  """Centres of the patches of a grid as locations: ((j + ½) / x, (i + ½) / y).

  Args:
    height: rows of the grid.
    width: columns of the grid.

  Returns:
    (x, y) from 0 to 1, row by row, float32.

  Raises:
    ValueError: a size is not positive.

  Example:
    >>> patch_centres(1, 2).tolist()
    [[0.25, 0.5], [0.75, 0.5]]
  """
  if min(height, width) < 1:
    raise ValueError(f'sizes must be positive: {height=} {width=}')
  y, x = np.meshgrid(
    (np.arange(height) + 0.5) / height,
    (np.arange(width) + 0.5) / width,
    indexing='ij',
  )
  return np.stack([x, y], axis=-1).reshape(-1, 2).astype(np.float32)


def ring_offsets(
  num_heads: int, num_levels: int, num_points: int
) -> Float[np.ndarray, 'h l p 2']:
  r"""Offsets that send every head its own way: (p + 1) · u_h, u_h on a square.

  u_h = (cos θ_h, sin θ_h) / max(|cos θ_h|, |sin θ_h|) with θ_h = 2π h / heads.

  Args:
    num_heads: number of heads.
    num_levels: number of levels, which all get the same.
    num_points: points of a head at a level, one step further out each.

  Returns:
    (x, y) in pixels of the level, float32.

  Raises:
    ValueError: a number is not positive.

  Example:
    >>> ring_offsets(4, 1, 2)[1, 0].round().tolist()
    [[0.0, 1.0], [0.0, 2.0]]

  Source: Deformable DETR (2020), arXiv 2010.04159.
  """
  if min(num_heads, num_levels, num_points) < 1:
    raise ValueError(
      f'numbers must be positive: {num_heads=} {num_levels=} {num_points=}'
    )
  angles = 2 * np.pi * np.arange(num_heads) / num_heads
  ring = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
  ring = ring / np.abs(ring).max(axis=-1, keepdims=True)
  steps = np.arange(1, num_points + 1)
  ring = ring[:, None, None, :] * steps[None, None, :, None]
  shape = num_heads, num_levels, num_points, 2
  return np.broadcast_to(ring, shape).astype(np.float32)


def _corners(
  locations: Array, weights: Array, height: int, width: int
) -> tuple[Array, Array]:
  """Token and share of the four corners of every point: (n, t, h, 4 p)."""
  pixel_x = locations[..., 0] * width - 0.5
  pixel_y = locations[..., 1] * height - 0.5
  low_x, low_y = jnp.floor(pixel_x), jnp.floor(pixel_y)
  part_x, part_y = pixel_x - low_x, pixel_y - low_y
  places, shares = [], []
  for down in (0, 1):
    for right in (0, 1):
      y = low_y.astype(jnp.int32) + down
      x = low_x.astype(jnp.int32) + right
      inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
      share = (
        weights
        * (part_x if right else 1 - part_x)
        * (part_y if down else 1 - part_y)
      )
      places.append(jnp.where(inside, y * width + x, 0))
      shares.append(jnp.where(inside, share, 0))
  return jnp.concatenate(places, axis=-1), jnp.concatenate(shares, axis=-1)


@jax.custom_vjp
def _read(
  values: Float[Array, 'n s h f'],
  places: Int[Array, 'n t h k'],
  shares: Float[Array, 'n t h k'],
) -> Float[Array, 'n t h f']:
  """Σ_k share · values[place], in float32."""
  return jax.vmap(_read_image)(values, places, shares)


def _read_image(values: Array, places: Array, shares: Array) -> Array:
  """The same of one image: (s, h, f), (t, h, k), (t, h, k) to (t, h, f)."""
  heads = jnp.arange(values.shape[1])[None]
  total = jnp.zeros((*places.shape[:2], values.shape[-1]), jnp.float32)
  # Not one gather of (t, h, k, f), which would be written to memory.
  for k in range(places.shape[-1]):
    rows = values.at[places[..., k], heads].get(mode='promise_in_bounds')
    total += rows.astype(jnp.float32) * shares[..., k, None]
  return total


def _read_forward(
  values: Array, places: Array, shares: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
  return _read(values, places, shares), (values, places, shares)


def _read_backward(
  kept: tuple[Array, Array, Array], change: Array
) -> tuple[Array, np.ndarray, Array]:
  # Head by head, so that the rows that are added to stay in the cache.
  by_head = [jnp.moveaxis(x, 2, 0) for x in (*kept, change)]
  values, shares = jax.lax.map(lambda x: jax.vmap(_pull_rows)(*x), by_head)
  values = jnp.moveaxis(values, 0, 2).astype(kept[0].dtype)
  nothing = np.zeros(kept[1].shape, jax.dtypes.float0)
  return values, nothing, jnp.moveaxis(shares, 0, 2)


def _pull_rows(
  values: Array, places: Array, shares: Array, change: Array
) -> tuple[Array, Array]:
  """Gradients by values and shares of one image and head: (s, f), (t, k)."""

  def step(total: Array, corner: tuple[Array, Array]) -> tuple[Array, Array]:
    place, share = corner
    rows = values.at[place].get(mode='promise_in_bounds').astype(jnp.float32)
    gradient = jnp.sum(rows * change, axis=-1)
    total = total.at[place].add(
      share[:, None] * change, mode='promise_in_bounds'
    )
    return total, gradient

  start = varying_like(jnp.zeros(values.shape, jnp.float32), values, change)
  total, gradients = jax.lax.scan(step, start, (places.T, shares.T))
  return total, gradients.T


_read.defvjp(_read_forward, _read_backward)


def _check(values: Sequence[Array], locations: Array, weights: Array) -> None:
  shapes = [level.shape for level in values]
  if not shapes:
    raise ValueError('at least one level of values is needed: values=[]')
  if any(len(shape) != 5 for shape in shapes) or (
    len({(shape[0], *shape[3:]) for shape in shapes}) > 1
  ):
    raise ValueError(
      f'levels must be (n, y, x, h, f) and agree in n, h and f: {shapes}'
    )
  if any(0 in shape[1:3] for shape in shapes):
    raise ValueError(f'a level has no tokens: {shapes}')
  n, _, _, h, _ = shapes[0]
  if (
    weights.ndim != 5
    or locations.shape != (*weights.shape, 2)
    or (weights.shape[0], *weights.shape[2:4]) != (n, h, len(shapes))
  ):
    raise ValueError(
      'locations must be (n, t, h, l, p, 2) and weights (n, t, h, l, p) with '
      f'n={n} h={h} l={len(shapes)}: {locations.shape=} {weights.shape=}'
    )
