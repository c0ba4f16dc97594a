r"""Whether features find the same place in another picture of the same thing.

Attributes:
  soft_argmax: where a map of scores has its peak, between cells.
  correspondence_score: C, the share of key points that are found again.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from msba_jax.layers.normalize import safe_normalize

__all__ = ['correspondence_score', 'soft_argmax']


def soft_argmax(
  scores: Float[Array, '*b y x'], *, radius: int = 5, temperature: float = 0.02
) -> Float[Array, '*b 2']:
  r"""Where a map has its peak: the mean place in a window around the largest.

      Σ_p p softmax_p(score_p / β),  p no further than `radius` cells away

  Args:
    scores: such as cosines; finite.
    radius: half the side of the square window, in cells.
    temperature: β.

  Returns:
    Row and column in cells, float32; the middle of the first cell is at zero.

  Raises:
    ValueError: the map has no cell, or a number is out of range.

  Example:
    >>> scores = jnp.array([[0.0, 1.0, 1.0, 0.0]])
    >>> [round(x, 4) for x in soft_argmax(scores).tolist()]
    [0.0, 1.5]

  Source: Telling Left from Right (2023), arXiv 2311.17034.
  """
  height, width = scores.shape[-2:]
  if not height * width or radius < 0 or not temperature > 0:
    raise ValueError(
      f'{scores.shape=} must have cells, {radius=} be at least 0 and '
      f'{temperature=} above 0'
    )
  flat = scores.astype(jnp.float32).reshape(-1, height * width)
  places = np.stack(
    np.meshgrid(np.arange(height), np.arange(width), indexing='ij'), -1
  ).reshape(1, -1, 2)
  peak = jnp.asarray(places[0])[jnp.argmax(flat, axis=1)]
  near = jnp.max(jnp.abs(places - peak[:, None]), axis=2) <= radius
  weights = jax.nn.softmax(flat / temperature, axis=1, where=near)
  found = jnp.einsum(
    'bp,pc->bc', weights, places[0].astype(np.float32), precision='highest'
  )
  return found.reshape(*scores.shape[:-2], 2)


def correspondence_score(
  source: Float[Array, 'n _ _ d'],
  target: Float[Array, 'n _ _ d'],
  source_points: Float[Array, 'n p 2'],
  target_points: Float[Array, 'n p 2'],
  *,
  size: tuple[int, int],
  mask: Bool[Array, 'n p'] | None = None,
  alpha: float = 0.1,
  radius: int = 5,
  temperature: float = 0.02,
) -> Float[Array, ' n']:
  r"""The share of key points that features find in the other picture (PCK).

  A point's feature is read bilinearly from the source and compared by cosine
  with every cell of the target; the windowed soft-argmax of these says where
  the point is. It is found if that is within α · max(h, w) of where it is.

  Args:
    source: features of the pictures in which the points are known.
    target: features of the other pictures.
    source_points: (row, column) in pixels, from the upper left corner.
    target_points: the same points in the other picture.
    size: height and width of the pictures, h and w; the cells of a grid cover
      them evenly.
    mask: which points count; all by default.
    alpha: α.
    radius: of the window, see `soft_argmax`.
    temperature: of the soft-argmax.

  Returns:
    One share a pair of pictures, float32; NaN where no point counts. The C
    score is the mean over pairs.

  Raises:
    ValueError: a grid has no cell, or a number is out of range.

  Example:
    >>> grid = jax.random.normal(jax.random.key(0), (1, 8, 8, 16))
    >>> points = jnp.array([[[14.0, 18.0], [26.0, 6.0]]])
    >>> correspondence_score(grid, grid, points, points, size=(32, 32)).tolist()
    [1.0]

  Source: Law of Vision Representation in MLLMs (2024), arXiv 2408.16357.
  """
  if not alpha > 0 or min(size) < 1 or not source.size:
    raise ValueError(f'{alpha=} and {size=} must be positive; {source.shape=}')
  features = jax.vmap(_read, in_axes=(0, 0, None))(
    source.astype(jnp.float32), source_points, size
  )
  cosines = jnp.einsum(
    'npd,nyxd->npyx',
    safe_normalize(features),
    safe_normalize(target.astype(jnp.float32)),
    precision='highest',
  )
  found = soft_argmax(cosines, radius=radius, temperature=temperature)
  pixels = np.divide(size, target.shape[1:3]).astype(np.float32)
  found = (found + 0.5) * pixels[None, None]
  distance = jnp.sqrt(jnp.sum((found - target_points) ** 2, axis=-1))
  return jnp.mean(
    (distance <= alpha * max(size)).astype(jnp.float32), axis=1, where=mask
  )


def _read(
  grid: Float[Array, 'y x d'],
  points: Float[Array, 'p 2'],
  size: tuple[int, int],
) -> Float[Array, 'p d']:
  """Features at points in pixels; beyond the outer cells, that of the edge."""
  cells = np.array([grid.shape[:2]], np.float32)
  places = points * (cells / np.array([size], np.float32)) - 0.5
  places = jnp.clip(places, 0.0, cells - 1)
  low = jnp.floor(places).astype(jnp.int32)
  high = jnp.minimum(low + 1, cells.astype(np.int32) - 1)
  share = places - low
  (y0, x0), (y1, x1), (dy, dx) = low.T, high.T, share.T[..., None]
  upper = grid[y0, x0] * (1 - dx) + grid[y0, x1] * dx
  lower = grid[y1, x0] * (1 - dx) + grid[y1, x1] * dx
  return upper * (1 - dy) + lower * dy
