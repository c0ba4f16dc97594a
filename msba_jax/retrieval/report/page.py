"""The report as a page: one HTML file that carries everything in itself.

No script runs in it and nothing is loaded, which a content security policy
in the page enforces. Names and ids come from users and are escaped.

Attributes:
  write_report: writes the file.
  render_report: the page as a string.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from typing import Any

import jinja2
import markupsafe
import numpy as np

from msba_jax import __version__
from msba_jax.data.atomic import write_atomically
from msba_jax.retrieval.report import (
  arrows,
  charts,
  headline,
  matrix,
  stripes,
)
from msba_jax.retrieval.report.data import (
  Answers,
  CausalMap,
  Picture,
  QueryResult,
  ReportData,
  SparseMap,
  WhatIf,
)
from msba_jax.retrieval.report.picture import data_uri, thumbnail

_PIXELS = 1_000_000
_LARGEST, _SMALLEST = 112, 24
_QUERY = 1.5
_WORDS = {None: 'class unknown', True: 'right', False: 'wrong'}
_STATES = {None: 'unknown', True: 'right', False: 'wrong'}
_MARKS = {None: '', True: '✓', False: '✗'}
_ICON = (
  b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">'
  b'<rect width="16" height="16" rx="4" fill="#3a5fcd"/>'
  b'<path d="M4 8.5l2.7 2.7L12 5.4" fill="none" stroke="#fff" '
  b'stroke-width="2"/></svg>'
)


def write_report(path: str | os.PathLike[str], data: ReportData) -> None:
  """Writes the report as one HTML file; an older one is replaced as a whole.

  Args:
    path: the file; folders above it are made.
    data: what it shows.
  """
  write_atomically(path, render_report(data).encode())


def render_report(data: ReportData) -> str:
  """The report as an HTML page.

  Args:
    data: what it shows.

  Returns:
    The page. All thumbnails together have about a million pixels, so that
    it stays below five megabytes however many queries are shown.

  Example:
    >>> page = render_report(ReportData(title='Trial of <b>'))
    >>> '<title>Trial of &lt;b&gt;</title>' in page
    True
  """
  environment = _environment()
  style = environment.get_template('report.css').render()
  thumbnails = _Thumbnails(data)
  attention = data.attention
  return environment.get_template('report.html').render(
    version=__version__,
    style=markupsafe.Markup(style),
    style_hash=f'sha256-{_digest(style)}',
    icon=data_uri(_ICON, 'image/svg+xml'),
    title=data.title,
    description=data.description,
    facts=data.facts,
    cards=headline.cards(data.modes),
    metric_names=headline.metric_names(data.modes),
    table=headline.table(data.modes),
    interval=data.interval,
    before=data.before,
    after=data.after,
    reranked=any(q.after is not None for q in data.queries + data.hardest),
    queries=[_query(q, data, thumbnails) for q in data.queries],
    queries_choice=data.queries_choice,
    hardest=[_query(q, data, thumbnails) for q in data.hardest],
    attention=attention
    and {
      'svg': markupsafe.Markup(
        environment.get_template('attention.svg').render(
          **matrix.layout(attention)
        )
      ),
      'summary': matrix.summary(attention),
    },
    causal=data.causal and _causal(data.causal, environment),
    what_if=data.what_if and _what_if(data.what_if, thumbnails),
    sparse=data.sparse and _sparse(data.sparse, environment),
    classes=charts.classes(data),
    panels=[charts.panel(panel) for panel in data.panels],
    configuration=data.configuration,
    environment=data.environment,
    command=data.command,
  )


@functools.cache
def _environment() -> jinja2.Environment:
  return jinja2.Environment(
    loader=jinja2.PackageLoader('msba_jax.retrieval.report', 'templates'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )


def _digest(text: str) -> str:
  return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class _Thumbnails:
  """Describes pictures with thumbnails that together keep to the budget."""

  def __init__(self, data: ReportData):
    results = data.queries + data.hardest
    hits = sum(
      len(side.hits)
      for result in results
      for side in (result.before, result.after)
      if side is not None
    )
    asking = len(results)
    if data.what_if is not None:
      hits, asking = hits + len(data.what_if.left_out), asking + 1
    budget = float(_PIXELS)
    if data.attention is not None:
      budget -= len(data.attention.pictures) * matrix.FACE_PIXELS**2
    if data.causal is not None:
      budget -= len(data.causal.pictures) * arrows.FACE_PIXELS**2
    if data.sparse is not None:
      budget -= len(data.sparse.pictures) * stripes.FACE_PIXELS**2
    # A query is shown larger than its results, and has more pixels.
    count = max(hits + _QUERY**2 * asking, 1)
    side = np.clip(np.sqrt(max(budget, 0) / count), _SMALLEST, _LARGEST)
    self._hit_side, self._query_side = int(side), int(_QUERY * side)

  def hit(self, picture: Picture, alt: str) -> dict[str, Any]:
    return self._describe(picture, alt, self._hit_side)

  def query(self, picture: Picture, alt: str) -> dict[str, Any]:
    return self._describe(picture, alt, self._query_side)

  def _describe(self, picture: Picture, alt: str, side: int) -> dict[str, Any]:
    height, width = picture.image.shape[:2]
    return {
      'uri': thumbnail(picture.image, side),
      'alt': alt,
      'id': picture.id,
      'label': picture.label,
      'width': width,
      'height': height,
    }


def _query(
  result: QueryResult,
  data: ReportData,
  thumbnails: _Thumbnails,
) -> dict[str, Any]:
  query, after = result.query, result.after
  return {
    'query': thumbnails.query(query, f'Query {query.id}{_of_class(query)}'),
    'before': _answers(result.before, data.before, thumbnails),
    'after': after and _answers(after, data.after or 're-ranked', thumbnails),
  }


def _answers(
  answers: Answers, name: str, thumbnails: _Thumbnails
) -> dict[str, Any]:
  summary = []
  if answers.average_precision is not None:
    summary.append(f'AP {headline.percent(answers.average_precision)}')
  if answers.first_right is not None:
    summary.append(f'first right at {answers.first_right:,}')
  return {
    'name': name,
    'summary': ' · '.join(summary),
    'hits': [
      thumbnails.hit(
        hit.picture,
        f'Result {rank}, {_WORDS[hit.correct]}: '
        f'{hit.picture.id}{_of_class(hit.picture)}',
      )
      | {
        'state': _STATES[hit.correct],
        'mark': _MARKS[hit.correct],
        'score': f'{hit.score:.3f}',
      }
      for rank, hit in enumerate(answers.hits, start=1)
    ],
  }


def _causal(graph: CausalMap, environment: jinja2.Environment) -> Any:
  variables = arrows.layout(graph)
  svg = environment.get_template('causal.svg').render(**variables)
  return variables | {
    'svg': markupsafe.Markup(svg),
    'summary': arrows.summary(graph),
  }


def _what_if(what_if: WhatIf, thumbnails: _Thumbnails) -> dict[str, Any]:
  query, base = what_if.query, what_if.average_precision
  return {
    'query': thumbnails.query(query, f'Query {query.id}{_of_class(query)}'),
    'precision': headline.percent(base),
    'first': f'{what_if.first_right:,}',
    'count': len(what_if.left_out),
    'rows': [
      {
        'picture': thumbnails.hit(
          lost.picture,
          f'Neighbour, {_WORDS[lost.correct]}: '
          f'{lost.picture.id}{_of_class(lost.picture)}',
        )
        | {'state': _STATES[lost.correct], 'mark': _MARKS[lost.correct]},
        'score': headline.percent(lost.score),
        'cosine': f'{lost.cosine:.5f}',
        'precision': headline.percent(lost.average_precision),
        'change': headline.points(lost.average_precision - base),
        'first': f'{lost.first_right:,}',
      }
      for lost in what_if.left_out
    ],
  }


def _sparse(sparse: SparseMap, environment: jinja2.Environment) -> Any:
  template = environment.get_template('sparse.svg')
  variables = stripes.layout(sparse)
  return variables | {
    'looks': [
      look | {'svg': markupsafe.Markup(template.render(**look))}
      for look in variables['looks']
    ],
    'summary': stripes.summary(sparse),
  }


def _of_class(picture: Picture) -> str:
  return f', class {picture.label}' if picture.label else ''
