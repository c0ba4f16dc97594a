"""Charts of the report: SVG drawn by matplotlib's object interface.

Every chart exists for a light and for a dark page. Text stays text, so that
the reader's own fonts show class names in any script.

Attributes:
  Theme: the colours of a chart.
  LIGHT: on a white page.
  DARK: on a dark page.
  curve_chart: a panel of training curves.
  running_mean: what is drawn over a curve that jumps.
  recall_chart: recall of classes, as bars with dots.
  draw: what turns a figure into a file's bytes.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from msba_jax.retrieval.report.data import ClassRecall, CurvePanel


class Theme(NamedTuple):
  """The colours of a chart.

  Attributes:
    text: titles and labels.
    muted: ticks and axes.
    grid: lines behind the data.
    series: one colour per curve, never the green and red of right and wrong.
  """

  text: str
  muted: str
  grid: str
  series: tuple[str, ...]


LIGHT = Theme(
  text='#1b1f27',
  muted='#5b6472',
  grid='#e3e6ec',
  series=('#3a5fcd', '#c06c00', '#7b3fb5', '#00767a', '#8a8f98', '#a33a78'),
)
DARK = Theme(
  text='#e7eaf0',
  muted='#a0a8b6',
  grid='#2c323d',
  series=('#8aa6ff', '#f2b04e', '#c79bf2', '#4fc3c7', '#9aa1ad', '#ee93c4'),
)

_LINES_AT_MOST = 600


def curve_chart(panel: CurvePanel, theme: Theme) -> bytes:
  """A panel of training curves.

  Args:
    panel: the curves; those that jump are drawn thin, with a running mean.
    theme: colours.

  Returns:
    An SVG document.
  """
  with _settings():
    figure = Figure(figsize=(4.2, 2.7), layout='constrained')
    axes = figure.subplots()
    _clean(axes, theme)
    axes.grid(color=theme.grid, linewidth=0.8)
    for index, curve in enumerate(panel.curves):
      colour = theme.series[index % len(theme.series)]
      keep = np.isfinite(curve.values)
      steps, values = curve.steps[keep], curve.values[keep]
      name = curve.name
      if panel.smooth and len(values) >= 20:
        thin = _thinned(len(values))
        axes.plot(
          steps[thin], values[thin], color=colour, alpha=0.35, linewidth=0.8
        )
        values = running_mean(values)
      thin = _thinned(len(values))
      marker = 'o' if len(values) <= 25 else ''
      axes.plot(
        steps[thin],
        values[thin],
        color=colour,
        linewidth=1.8,
        marker=marker,
        markersize=3.5,
        label=name,
      )
    axes.set_xlabel('step', color=theme.muted)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:,.0f}'))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if panel.percent:
      axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f'{100 * y:g} %')
      )
    if len(panel.curves) > 1:
      _legend(axes, theme, min(len(panel.curves), 2))
    return draw(figure, 'svg')


def running_mean(values: Float[np.ndarray, ' s']) -> Float[np.ndarray, ' s']:
  """The centred mean over about a twentieth of the curve.

  Args:
    values: finite numbers.

  Returns:
    Their means; the window shrinks towards both ends.
  """
  reach = max(1, len(values) // 40)
  sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
  index = np.arange(len(values))
  low = np.maximum(index - reach, 0)
  high = np.minimum(index + reach + 1, len(values))
  return (sums[high] - sums[low]) / (high - low)


def recall_chart(
  classes: Sequence[ClassRecall],
  theme: Theme,
  *,
  before: str,
  after: str | None,
) -> bytes:
  """Recall@1 of classes: a bar before and a dot after re-ranking.

  Args:
    classes: from top to bottom.
    theme: colours.
    before: name of the mode of the bars.
    after: name of the mode of the dots; None draws none.

  Returns:
    An SVG document.
  """
  with _settings():
    figure = Figure(
      figsize=(5.2, 0.9 + 0.21 * len(classes)), layout='constrained'
    )
    axes = figure.subplots()
    _clean(axes, theme)
    axes.grid(axis='x', color=theme.grid, linewidth=0.8)
    rows = np.arange(len(classes))
    bars = axes.barh(
      rows,
      [100 * c.before for c in classes],
      height=0.62,
      color=theme.series[0],
      alpha=0.6,
      label=before,
    )
    handles: list[Any] = [bars]
    if after is not None:
      recalls = [np.nan if c.after is None else c.after for c in classes]
      handles += axes.plot(
        100 * np.asarray(recalls),
        rows,
        'D',
        color=theme.series[1],
        markersize=4.5,
        label=after,
        clip_on=False,
        zorder=3,
      )
    axes.set_xlim(0, 100)
    axes.set_ylim(len(classes) - 0.4, -0.6)
    names = [_shorten(c.name, 26) for c in classes]
    axes.set_yticks(rows, names, parse_math=False)
    axes.tick_params(axis='y', length=0, labelcolor=theme.text)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g} %'))
    _legend(axes, theme, 2, handles)
    return draw(figure, 'svg')


def draw(
  figure: Figure, kind: Literal['svg', 'png'], *, dpi: int = 144
) -> bytes:
  """Renders a figure; the same figure gives the same bytes.

  Args:
    figure: what to render; its canvas is replaced.
    kind: the format.
    dpi: pixels per inch of a PNG.

  Returns:
    The file's bytes.
  """
  FigureCanvasAgg(figure)
  buffer = io.BytesIO()
  metadata = {'Date': None} if kind == 'svg' else {'Software': None}
  with warnings.catch_warnings():
    # The page is shown in the reader's fonts, which have these characters.
    warnings.filterwarnings('ignore', 'Glyph .* missing from', UserWarning)
    figure.savefig(
      buffer, format=kind, dpi=dpi, transparent=kind == 'svg', metadata=metadata
    )
  return buffer.getvalue()


@contextlib.contextmanager
def _settings() -> Iterator[None]:
  """Settings of our charts, whatever the user's own matplotlibrc says."""
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(
      {
        'svg.fonttype': 'none',
        'svg.hashsalt': 'msba_jax',
        'font.size': 9.0,
        'font.family': ['DejaVu Sans', 'sans-serif'],
      }
    )
    yield


def _clean(axes: Axes, theme: Theme) -> None:
  """Leaves of an axes box what a reader needs."""
  axes.patch.set_visible(False)
  for side in ('top', 'right', 'left'):
    axes.spines[side].set_visible(False)
  axes.spines['bottom'].set_color(theme.grid)
  axes.tick_params(colors=theme.muted, length=0)
  axes.set_axisbelow(True)


def _legend(
  axes: Axes, theme: Theme, columns: int, handles: Sequence[Any] | None = None
) -> None:
  """Puts the legend above the axes, where it hides nothing."""
  legend = axes.legend(
    handles=handles or axes.get_legend_handles_labels()[0],
    loc='lower left',
    bbox_to_anchor=(0.0, 1.0),
    ncols=columns,
    frameon=False,
    labelcolor=theme.text,
    borderaxespad=0.2,
    handlelength=1.4,
  )
  for text in legend.get_texts():
    text.set_parse_math(False)


def _thinned(count: int) -> np.ndarray:
  """Indices of the points worth a place in the file: all, or 600 of them."""
  if count <= _LINES_AT_MOST:
    return np.arange(count)
  return np.linspace(0, count - 1, _LINES_AT_MOST).round().astype(int)


def _shorten(text: str, limit: int) -> str:
  return text if len(text) <= limit else text[: limit - 1] + '…'
