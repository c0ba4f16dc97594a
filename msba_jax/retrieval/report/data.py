"""What a report shows: arrays, strings and numbers, already computed.

Rendering needs nothing else: no model, no source, no experiment. Whatever is
None or empty is left out of the page, which then says so in a sentence.

Attributes:
  Estimate: a number, perhaps with its interval.
  Mode: one way to embed, with its metrics.
  Picture: an image with its name and its class.
  Hit: one result of a query.
  Answers: the best results of a query in one mode.
  QueryResult: a query, its results, and its results after re-ranking.
  AttentionMap: who looks at whom in a batch.
  CausalMap: who depends on whom in a batch.
  LeftOut: what a query loses with one image of its context.
  WhatIf: a query without each image of its context in turn.
  Stripes: how wide the stripes of some images are.
  KeptRegions: which regions of some images are kept.
  SparseMap: what a sparse model decided for some images.
  ClassRecall: recall@1 of the queries of one class.
  Curve: a number over the steps of training.
  CurvePanel: curves that share their axes.
  ReportData: the whole report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from msba_jax.layers.windows import Direction


@dataclass(frozen=True)
class Estimate:
  """A number, with the interval it lies in where that is known.

  Attributes:
    value: the number.
    low: lower end of the interval.
    high: upper end of the interval.
  """

  value: float
  low: float | None = None
  high: float | None = None


@dataclass(frozen=True)
class Mode:
  """One way to embed images, with what it reached.

  Attributes:
    name: its short name, such as 'solo'.
    description: what it does, in one sentence without a full stop.
    metrics: estimates by the metric's name, as fractions of one.
    gains: paired differences to the report's first mode, by metric.
  """

  name: str
  description: str = ''
  metrics: Mapping[str, Estimate] = field(default_factory=dict)
  gains: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Picture:
  """An image with its name and its class.

  Attributes:
    image: RGB.
    id: its name in the collection.
    label: the name of its class; empty where it is not known.
  """

  image: UInt8[np.ndarray, 'height width 3']
  id: str
  label: str = ''


@dataclass(frozen=True, eq=False)
class Hit:
  """One result of a query.

  Attributes:
    picture: the image that was found.
    score: its similarity to the query.
    correct: whether it has the query's class; None where nobody knows.
  """

  picture: Picture
  score: float
  correct: bool | None


@dataclass(frozen=True, eq=False)
class Answers:
  """The best results of a query in one mode.

  Attributes:
    hits: best first.
    average_precision: of the query over the whole gallery.
    first_right: rank of the first right result, from 1, in the whole
      gallery or among `hits`; None where that is not known.
  """

  hits: tuple[Hit, ...]
  average_precision: float | None = None
  first_right: int | None = None


@dataclass(frozen=True, eq=False)
class QueryResult:
  """A query, its results, and its results after re-ranking.

  Attributes:
    query: the image that asks.
    before: what the first mode answers.
    after: what the re-ranking mode answers.
  """

  query: Picture
  before: Answers
  after: Answers | None = None


@dataclass(frozen=True, eq=False)
class AttentionMap:
  """Who looks at whom in a batch.

  Attributes:
    pictures: the batch, images of a class side by side.
    weights: how much image n (a row) reads from image m (a column).
  """

  pictures: tuple[Picture, ...]
  weights: Float[np.ndarray, 'n n']


@dataclass(frozen=True, eq=False)
class CausalMap:
  """Who depends on whom in a batch.

  Attributes:
    pictures: the batch, images of a class side by side.
    weights: at each level, how much image n (a row) depends on image m (a
      column); zero is no edge.
  """

  pictures: tuple[Picture, ...]
  weights: Float[np.ndarray, 'l n n']


@dataclass(frozen=True, eq=False)
class LeftOut:
  """What a query loses with one image of its context.

  Attributes:
    picture: the image that is left out.
    correct: whether it has the query's class.
    score: its causal score for the query while it is there, mean over levels.
    cosine: between the query's embeddings with and without it.
    average_precision: of the query without it.
    first_right: rank of the first right result without it, from 1.
  """

  picture: Picture
  correct: bool
  score: float
  cosine: float
  average_precision: float
  first_right: int


@dataclass(frozen=True, eq=False)
class WhatIf:
  """A query without each image of its context in turn.

  Attributes:
    query: the image that asks.
    average_precision: of the query with its whole context.
    first_right: rank of its first right result, from 1.
    left_out: the images of its context, the largest change first.
  """

  query: Picture
  average_precision: float
  first_right: int
  left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, eq=False)
class Stripes:
  """How wide the stripes are along which some images look.

  Attributes:
    grids: rows and columns of tokens at each level, fine to coarse.
    widths: in tokens, at each level and of every image.
    directions: along which a head looks.
  """

  grids: Int[np.ndarray, 'l 2']
  widths: Int[np.ndarray, 'l m']
  directions: tuple[Direction, ...] = get_args(Direction)


@dataclass(frozen=True, eq=False)
class KeptRegions:
  """Which regions of some images are kept.

  Attributes:
    cuts: rows and columns of regions at each level, fine to coarse.
    shares: the share of pairs of regions that is kept, at each level and of
      every image.
    finest: at the finest level of the images that are shown, which regions (a
      column) a region (a row) keeps in each head.
  """

  cuts: Int[np.ndarray, 'l 2']
  shares: Float[np.ndarray, 'l m']
  finest: Bool[np.ndarray, 'p h i i']


@dataclass(frozen=True, eq=False)
class SparseMap:
  """What a sparse model decided for some images, a few of which are shown.

  Attributes:
    pictures: the images that are shown.
    shown: their places among all.
    stripes: of all images; None for a model without stripes.
    regions: of all images; None for a model that keeps every region.
  """

  pictures: tuple[Picture, ...]
  shown: Int[np.ndarray, ' p']
  stripes: Stripes | None = None
  regions: KeptRegions | None = None


@dataclass(frozen=True)
class ClassRecall:
  """Recall@1 of the queries of one class.

  Attributes:
    name: the class.
    queries: how many ask.
    before: the share of them whose first result is right.
    after: the same after re-ranking.
  """

  name: str
  queries: int
  before: float
  after: float | None = None


@dataclass(frozen=True, eq=False)
class Curve:
  """A number over the steps of training.

  Attributes:
    name: what it is called in the legend.
    steps: steps, ascending.
    values: the number at each step; what is not finite is not drawn.
  """

  name: str
  steps: Int[np.ndarray, ' s']
  values: Float[np.ndarray, ' s']


@dataclass(frozen=True, eq=False)
class CurvePanel:
  """Curves that share their axes.

  Attributes:
    title: what the panel shows.
    curves: at least one.
    percent: whether values are fractions to be read in per cent.
    smooth: whether the curves jump from step to step, so that a running mean
      is drawn over them.
  """

  title: str
  curves: tuple[Curve, ...]
  percent: bool = False
  smooth: bool = False


@dataclass(frozen=True, eq=False)
class ReportData:
  """The whole report.

  Attributes:
    title: the headline.
    description: what was done, in a sentence or two.
    facts: short facts under the headline, (name, value).
    modes: headline numbers; the first is the one others are compared with.
    interval: how the intervals were computed, in one sentence.
    before: name of the mode of `QueryResult.before`.
    after: name of the mode of `QueryResult.after`; None without re-ranking.
    queries: some queries.
    queries_choice: how they were chosen, in one sentence.
    hardest: queries with the lowest average precision, hardest first.
    attention: one batch; None where no image looks at another.
    causal: one batch; None for a model without a causal graph.
    what_if: one query; None for a model without a causal graph.
    sparse: some queries; None for a model that looks at everything.
    classes: recall of each class.
    panels: training curves.
    configuration: (name, value) of every setting.
    environment: (name, value) of versions, devices, commit.
    command: what reproduces the report.
  """

  title: str
  description: str = ''
  facts: tuple[tuple[str, str], ...] = ()
  modes: tuple[Mode, ...] = ()
  interval: str = ''
  before: str = 'solo'
  after: str | None = None
  queries: tuple[QueryResult, ...] = ()
  queries_choice: str = ''
  hardest: tuple[QueryResult, ...] = ()
  attention: AttentionMap | None = None
  causal: CausalMap | None = None
  what_if: WhatIf | None = None
  sparse: SparseMap | None = None
  classes: tuple[ClassRecall, ...] = ()
  panels: tuple[CurvePanel, ...] = ()
  configuration: tuple[tuple[str, str], ...] = ()
  environment: tuple[tuple[str, str], ...] = ()
  command: str = ''
