"""The ranking as a picture: where candidates lie, and what they are to reach.

Attributes:
  ranking_picture: a scatter of A and C beside predictions with intervals.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from msba_jax.analysis.ranking import Ranking
from msba_jax.retrieval.report.figures import LIGHT, draw

__all__ = ['ranking_picture']


def ranking_picture(ranking: Ranking) -> bytes:
  """Two panels: A and C of each candidate; its performance, best first.

  Args:
    ranking: from `rank_backbones`.

  Returns:
    A PNG file.
  """
  rows = ranking.candidates
  figure = Figure(
    figsize=(10, max(4.0, 0.28 * len(rows) + 1.4)), layout='constrained'
  )
  square, line = figure.subplots(1, 2)
  points = _square(square, ranking)
  figure.colorbar(points, ax=square, label=f'{ranking.metric}, %')
  _line(line, ranking)
  for axes in (square, line):
    axes.spines[['top', 'right']].set_visible(False)
  return draw(figure, 'png')


def _square(square: Axes, ranking: Ranking) -> PathCollection:
  """A and C of each candidate, coloured by its performance."""
  rows = ranking.candidates
  expected = 100 * np.array([row.expected for row in rows])
  points = square.scatter(
    [row.alignment for row in rows],
    [row.correspondence for row in rows],
    c=expected,
    cmap='viridis',
    s=60,
    edgecolors=[
      LIGHT.text if row.measured is not None else 'none' for row in rows
    ],
    linewidths=1.6,
  )
  for place, row in enumerate(rows, start=1):
    square.annotate(
      str(place),
      (row.alignment, row.correspondence),
      xytext=(5, 5),
      textcoords='offset points',
      fontsize=8,
    )
  square.set_xlabel('A: alignment')
  square.set_ylabel('C: correspondence')
  return points


def _line(line: Axes, ranking: Ranking) -> None:
  """What each candidate is to reach, and what it reached."""
  rows = ranking.candidates
  places = np.arange(len(rows))
  for place, row in zip(places, rows, strict=True):
    if np.isfinite([row.low, row.high]).all():
      line.plot(
        [100 * row.low, 100 * row.high],
        [place, place],
        color=LIGHT.grid,
        linewidth=4,
        solid_capstyle='butt',
      )
  line.plot(
    [100 * row.predicted for row in rows],
    places,
    'o',
    color=LIGHT.series[0],
    label='predicted',
  )
  trained = [i for i, row in enumerate(rows) if row.measured is not None]
  line.plot(
    [100 * (rows[i].measured or 0.0) for i in trained],
    trained,
    'D',
    color=LIGHT.series[1],
    label='trained',
  )
  line.set_yticks(
    places, [f'{i}  {row.name}' for i, row in enumerate(rows, start=1)]
  )
  line.invert_yaxis()
  line.set_xlabel(f'{ranking.metric}, %')
  line.legend(fontsize=8, frameon=False)
