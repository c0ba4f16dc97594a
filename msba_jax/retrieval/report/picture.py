"""Pictures as bytes: thumbnails for the page, and the results of one search.

Attributes:
  thumbnail: a small JPEG as a data URI.
  data_uri: bytes as an address that a page can carry in itself.
  results_picture: a query with its results in one PNG file.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from msba_jax.data.atomic import write_atomically
from msba_jax.retrieval.report.figures import LIGHT, draw

_RIGHT, _WRONG, _NEUTRAL = '#1a7f37', '#c9252d', '#8a8f98'
_PER_ROW = 10


def data_uri(content: bytes, kind: str) -> str:
  """Bytes as an address that a page can carry in itself.

  Args:
    content: the file's bytes.
    kind: its media type.

  Returns:
    A data URI.

  Example:
    >>> data_uri(b'a', 'image/png')
    'data:image/png;base64,YQ=='
  """
  return f'data:{kind};base64,{base64.b64encode(content).decode()}'


def thumbnail(image: UInt8[np.ndarray, 'height width 3'], side: int) -> str:
  """A small JPEG as a data URI.

  Args:
    image: RGB.
    side: the longer side at most; smaller images stay as they are.

  Returns:
    A data URI.
  """
  picture = Image.fromarray(np.ascontiguousarray(image))
  picture.thumbnail((side, side), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  picture.save(buffer, 'JPEG', quality=84, subsampling=0, optimize=True)
  return data_uri(buffer.getvalue(), 'image/jpeg')


def results_picture(
  query: UInt8[np.ndarray, 'height width 3'],
  results: Sequence[np.ndarray],
  correct: Sequence[bool | None] | None,
  scores: Float[np.ndarray, ' k'] | Sequence[float],
  path: str | os.PathLike[str],
  *,
  ids: Sequence[str],
  query_id: str = '',
) -> None:
  """Writes a query with its results, best first, as a PNG file.

  A right result has a green frame and ✓, a wrong one a red frame and ✗, one of
  which nothing is known a grey frame.

  Args:
    query: RGB.
    results: RGB images, uint8, (height, width, 3).
    correct: whether each is right; None, as a whole or one by one, where
      labels are not known.
    scores: similarity of each to the query.
    path: the file; it is replaced as a whole.
    ids: name of each result.
    query_id: name of the query.

  Raises:
    ValueError: the results, their scores, ids or labels differ in number.
  """
  known = [None] * len(results) if correct is None else list(correct)
  counts = (len(results), len(scores), len(ids), len(known))
  if len(set(counts)) != 1:
    raise ValueError(
      f'results, scores, ids and correct must be equally many, got {counts}'
    )
  rows = max(1, -(-len(results) // _PER_ROW))
  columns = min(max(len(results), 1), _PER_ROW)
  width, height = 1.25 * columns + 2.5, max(1.62 * rows + 0.25, 2.5)
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    figure = Figure(figsize=(width, height), facecolor='white')
    box = _Canvas(figure, width, height)
    top = height - 0.18
    box.image(query, 0.2, top, 1.8)
    box.frame(0.2, top, 1.8, LIGHT.series[0])
    box.text(0.2, top - 1.8 - 0.13, 'query', LIGHT.text, weight='bold')
    box.text(0.2, top - 1.8 - 0.3, _tail(query_id, 28), LIGHT.muted, size=6.5)
    for rank, image in enumerate(results):
      left = 2.35 + 1.25 * (rank % _PER_ROW)
      upper = top - 1.62 * (rank // _PER_ROW)
      right = known[rank]
      colour = _NEUTRAL if right is None else _RIGHT if right else _WRONG
      mark = '' if right is None else '✓ ' if right else '✗ '
      box.image(image, left, upper, 1.1)
      box.frame(left, upper, 1.1, colour)
      label = f'{mark}{rank + 1}.  {float(scores[rank]):.3f}'
      box.text(left, upper - 1.22, label, colour, weight='bold')
      box.text(left, upper - 1.38, _tail(ids[rank], 18), LIGHT.muted, size=6.5)
    content = draw(figure, 'png', dpi=160)
  write_atomically(path, content)


class _Canvas:
  """Places things on a figure in inches, from its lower left corner."""

  def __init__(self, figure: Figure, width: float, height: float):
    self.figure, self.width, self.height = figure, width, height

  def image(
    self, image: np.ndarray, left: float, top: float, side: float
  ) -> None:
    axes = self.figure.add_axes(
      (
        left / self.width,
        (top - side) / self.height,
        side / self.width,
        side / self.height,
      )
    )
    axes.imshow(image, interpolation='lanczos')
    axes.set_axis_off()

  def frame(self, left: float, top: float, side: float, colour: str) -> None:
    self.figure.add_artist(
      Rectangle(
        (left / self.width, (top - side) / self.height),
        side / self.width,
        side / self.height,
        fill=False,
        edgecolor=colour,
        linewidth=2.6,
        joinstyle='round',
        zorder=5,
      )
    )

  def text(
    self,
    left: float,
    top: float,
    text: str,
    colour: str,
    *,
    size: float = 8.0,
    weight: str = 'normal',
  ) -> None:
    self.figure.text(
      left / self.width,
      top / self.height,
      text,
      color=colour,
      fontsize=size,
      fontweight=weight,
      va='center',
      parse_math=False,
    )


def _tail(text: str, limit: int) -> str:
  """The end of a long name, which tells more than its beginning."""
  return text if len(text) <= limit else '…' + text[1 - limit :]
