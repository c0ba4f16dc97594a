"""Where a sparse model looks, as a drawing over the picture.

Beside the picture a panel shows the cross of stripes of one token, another how
many regions of the image keep each region. The token stands in the region that
most others keep. Both are of the finest level.

Attributes:
  FACE_PIXELS: side of the pictures.
  layout: paths and texts for the template.
  summary: what was decided over all images, in a sentence.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Shaped

from msba_jax.layers.windows import Direction, stripe_windows
from msba_jax.retrieval.report.data import KeptRegions, SparseMap, Stripes
from msba_jax.retrieval.report.headline import percent
from msba_jax.retrieval.report.picture import thumbnail

FACE_PIXELS = 160
_SIDE, _GAP = 240, 12
# Shares that differ by no more differ by their rounding.
_ALIKE = 1e-6


def layout(sparse: SparseMap) -> dict[str, Any]:
  """Paths and texts for the template.

  Args:
    sparse: decisions and pictures.

  Returns:
    The variables of `sparse.html`; those of `sparse.svg` are in `looks`, one
    an image. Colours of regions have one scale over all images: opaque is the
    largest share of regions that keep one.

  Raises:
    ValueError: places or decisions and pictures differ in number, or nothing
      was decided.
  """
  count = len(sparse.pictures)
  stripes, regions = sparse.stripes, sparse.regions
  if len(sparse.shown) != count:
    raise ValueError(f'{len(sparse.shown)=} does not fit {count} pictures')
  if regions is not None and len(regions.finest) != count:
    raise ValueError(f'{regions.finest.shape=} does not fit {count} pictures')
  high = 1.0
  if regions is not None:
    high = float(regions.finest.mean(axis=(1, 2)).max(initial=0.0)) or 1.0
  return {
    'looks': [_look(sparse, place, high) for place in range(count)],
    'choice': _choice(sparse),
    'directions': [
      {'name': direction, 'series': get_args(Direction).index(direction)}
      for direction in (() if stripes is None else stripes.directions)
    ],
    'regions': regions is not None,
    'high': percent(high),
  }


def summary(sparse: SparseMap) -> str:
  """What was decided over all images: means and standard deviations.

  Args:
    sparse: decisions and pictures.

  Returns:
    A sentence.

  Raises:
    ValueError: nothing was decided.
  """
  stripes, regions = sparse.stripes, sparse.regions
  levels, images = _decided(sparse).shape
  parts = []
  for level in range(levels):
    found = []
    if regions is not None:
      shares = regions.shares[level]
      found.append(
        f'keeps {percent(shares.mean())} ± {100 * shares.std():.1f} of all '
        'pairs of regions'
      )
    if stripes is not None:
      widths = stripes.widths[level]
      found.append(
        f'has stripes of {widths.mean():.1f} ± {widths.std():.1f} tokens'
      )
    parts.append(f'level {level + 1} {" and ".join(found)}')
  return f'Over {images} images (mean ± standard deviation) {"; ".join(parts)}.'


def _decided(sparse: SparseMap) -> Shaped[np.ndarray, 'l m']:
  """What orders the images, at each level."""
  if sparse.regions is not None:
    return sparse.regions.shares
  if sparse.stripes is not None:
    return sparse.stripes.widths
  raise ValueError('there are neither stripes nor regions to draw')


def _choice(sparse: SparseMap) -> str:
  """How the images were chosen, in a sentence."""
  decided = _decided(sparse)
  shown, images = len(sparse.shown), decided.shape[1]
  if shown == images:
    return f'Shown are all {shown} images.'
  ends, what = ('narrowest', 'widest'), 'stripes'
  if sparse.regions is not None:
    ends, what = ('smallest', 'largest'), 'shares of kept pairs of regions'
  if np.ptp(decided[0]) < _ALIKE:
    return (
      f'Shown are {shown} of {images} images drawn at random. At the finest '
      f'level the {what} are equal in all.'
    )
  return (
    f'Of {images} images drawn at random, the {shown // 2} with the {ends[0]} '
    f'and the {shown - shown // 2} with the {ends[1]} {what} at the finest '
    'level are shown.'
  )


class _Told(NamedTuple):
  """What is shown of one image: a drawing, a sentence, a row of the table."""

  panel: dict[str, Any]
  sentence: str
  name: str
  values: list[str]


def _look(sparse: SparseMap, place: int, high: float) -> dict[str, Any]:
  """Variables of one image."""
  picture, image = sparse.pictures[place], int(sparse.shown[place])
  stripes, regions = sparse.stripes, sparse.regions
  told, levels, centre = [], [], (0.5, 0.5)
  if regions is not None:
    levels = [f'{_by(cut)} regions' for cut in regions.cuts]
    rows, columns = (int(side) for side in regions.cuts[0])
    row, column = divmod(_marked(regions.finest[place], columns), columns)
    centre = (row + 0.5) / rows, (column + 0.5) / columns
  if stripes is not None:
    levels = [f'{_by(grid)} tokens' for grid in stripes.grids]
    told.append(_told_of_stripes(stripes, image, centre))
  if regions is not None:
    told.append(_told_of_regions(regions, place, image, high))
  height, width = picture.image.shape[:2]
  wide, tall = (
    max(round(_SIDE * side / max(height, width)), 1) for side in (width, height)
  )
  name = f'{picture.id} ({picture.label})' if picture.label else picture.id
  sentences = ' '.join(part.sentence for part in told)
  return {
    'id': f'look{place}',
    'uri': thumbnail(picture.image, FACE_PIXELS),
    'box': f'0 0 {len(told) * (wide + _GAP) + wide} {tall}',
    'width': wide,
    'height': tall,
    'panels': [
      part.panel | {'x': i * (wide + _GAP)}
      for i, part in enumerate(told, start=1)
    ],
    'alt': f'Where the model looks in {name}. {sentences}',
    'name': name,
    'label': picture.label,
    'picture': picture.id,
    'sentences': sentences,
    'levels': levels,
    'rows': [{'name': part.name, 'values': part.values} for part in told],
  }


def _told_of_stripes(
  stripes: Stripes, image: int, centre: tuple[float, float]
) -> _Told:
  """The stripes of the token at a point of the picture."""
  widths = [int(width) for width in stripes.widths[:, image]]
  rows, columns = (int(side) for side in stripes.grids[0])
  row, column = int(centre[0] * rows), int(centre[1] * columns)
  return _Told(
    _cross(stripes, (row, column), widths[0]),
    f'The token in row {row + 1} and column {column + 1} looks along stripes '
    f'that are {widths[0]} wide.',
    'width of stripes',
    [str(width) for width in widths],
  )


def _told_of_regions(
  regions: KeptRegions, place: int, image: int, high: float
) -> _Told:
  """Which regions are kept, and which of them by the marked one."""
  kept = regions.finest[place]
  rows, columns = (int(side) for side in regions.cuts[0])
  marked = _marked(kept, columns)
  some = kept.any(axis=0)
  sentence = (
    f'In some head the marked region keeps {some[marked].sum()} of {len(some)}'
  )
  others = np.delete(some[:, marked], marked)
  if len(others):
    sentence += f' and is kept by {others.sum()} of the {len(others)} others'
  return _Told(
    _heat(kept, (rows, columns), marked, high),
    f'{sentence}.',
    'pairs of regions kept',
    [percent(share) for share in regions.shares[:, image]],
  )


def _marked(kept: Bool[np.ndarray, 'h i i'], columns: int) -> int:
  """The region that most others keep; of several the most central one."""
  count = kept.shape[-1]
  others = kept & ~np.eye(count, dtype=bool)
  places = np.stack(np.divmod(np.arange(count), columns), axis=1)
  away = np.square(places - places.mean(axis=0)).sum(axis=1)
  return int(np.lexsort((away, -others.sum(axis=(0, 1))))[0])


def _cross(
  stripes: Stripes, place: tuple[int, int], width: int
) -> dict[str, Any]:
  """The stripes of one token, in the directions along which a head looks."""
  rows, columns = grid = int(stripes.grids[0, 0]), int(stripes.grids[0, 1])
  row, column = place
  token = row * columns + column
  paths = []
  for direction in stripes.directions:
    number = get_args(Direction).index(direction)
    windows = stripe_windows(rows, columns, direction=direction, stripe=width)
    own = windows.valid & (windows.indices == token)
    stripe = int(own.any(axis=1).argmax())
    cells = np.zeros(rows * columns, bool)
    cells[windows.indices[stripe][windows.valid[stripe]]] = True
    paths.append(
      {
        'kind': f'stripe series{number}',
        'd': _runs(cells.reshape(grid)),
        'title': f'{direction} stripe of {cells.sum()} tokens',
      }
    )
  mark = f'M{column} {row}h1v1h-1z'
  title = f'token in row {row + 1} and column {column + 1}'
  return _panel(grid, [*paths, *_rims(mark, 'marked', title)])


def _heat(
  kept: Bool[np.ndarray, 'h i i'],
  cut: tuple[int, int],
  marked: int,
  high: float,
) -> dict[str, Any]:
  """How many regions keep each region, and frames of what one of them keeps."""
  rows, columns = cut
  counts = kept.sum(axis=(0, 1)).reshape(rows, columns)
  most = kept.shape[0] * kept.shape[1]
  paths = [
    {
      'kind': 'heat',
      'd': _runs(counts == count),
      'opacity': f'{count / most / high:.3f}',
      'title': f'kept by {count} of {most} heads of regions',
    }
    for count in np.unique(counts)
    if count
  ]
  some = np.flatnonzero(kept[:, marked].any(axis=0))
  places = [divmod(int(i), columns) for i in some]
  frames = ''.join(f'M{column} {row}h1v1h-1z' for row, column in places)
  row, column = divmod(marked, columns)
  return _panel(
    (rows, columns),
    [
      *paths,
      *_rims(frames, 'kept', f'{len(places)} regions that one keeps'),
      *_rims(f'M{column} {row}h1v1h-1z', 'marked', 'the region that keeps'),
    ],
  )


def _panel(
  grid: tuple[int, int], paths: list[dict[str, Any]]
) -> dict[str, Any]:
  return {'rows': grid[0], 'columns': grid[1], 'paths': paths}


def _rims(path: str, kind: str, title: str) -> list[dict[str, Any]]:
  """A light line on a dark one, which is seen on any picture."""
  return [
    {'kind': f'rim {kind} {tone}', 'd': path, 'title': title}
    for tone in ('dark', 'light')
  ]


def _runs(cells: Bool[np.ndarray, 'rows columns']) -> str:
  """The cells of a grid as a path; neighbours in a row are one rectangle."""
  edges = np.diff(np.pad(cells, ((0, 0), (1, 1))).astype(np.int8), axis=1)
  starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
  return ''.join(
    f'M{start} {row}h{end - start}v1H{start}z'
    for (row, start), (_, end) in zip(starts, ends, strict=True)
  )


def _by(grid: Any) -> str:
  return f'{grid[0]} × {grid[1]}'
