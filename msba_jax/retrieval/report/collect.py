"""What a report shows, computed from a model and what it was scored with.

Attributes:
  RunInfo: what the report says about a run beside its scores.
  collect_report: everything, ready for `write_report`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from msba_jax.data.source import Evaluation
from msba_jax.retrieval.embed import Embedder
from msba_jax.retrieval.evaluate import ModeVectors
from msba_jax.retrieval.report.causal import batch_graph, leave_each_out
from msba_jax.retrieval.report.curves import curve_panels
from msba_jax.retrieval.report.data import ReportData
from msba_jax.retrieval.report.examples import (
  Examples,
  batch_attention,
  draw_batch,
)
from msba_jax.retrieval.report.sparse import where_it_looks
from msba_jax.retrieval.report.summaries import (
  INTERVAL,
  Scores,
  average_modes,
  mask_scores,
  recall_per_class,
)
from msba_jax.retrieval.search import Neighbours

# Images of the causal graph: more could not be told apart in a drawing.
_GRAPH_CLASSES, _GRAPH_IMAGES = 4, 3
# Images among which a sparse model is asked for those it treats differently.
_SPARSE_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class RunInfo:
  """What the report says about a run beside its scores.

  Attributes:
    title: the headline.
    description: what was done, in a sentence or two.
    command: what reproduces the report.
    rows: the lines of `metrics.jsonl`.
    configuration: settings, nested as they like.
    environment: versions, devices, commit, nested as they like.
  """

  title: str
  description: str = ''
  command: str = ''
  rows: Sequence[Mapping[str, Any]] = ()
  configuration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def collect_report(
  embedder: Embedder,
  evaluation: Evaluation,
  info: RunInfo,
  *,
  scores: Mapping[str, Scores],
  results: Mapping[str, Neighbours],
  pictures: Evaluation | None = None,
  vectors: Mapping[Any, ModeVectors] | None = None,
  neighbours: int = 20,
  queries: int = 6,
  hits: int = 8,
  hardest: int = 6,
  hardest_hits: int = 4,
  batch_classes: int = 6,
  batch_images: int = 4,
  resamples: int = 1000,
  seed: int = 0,
) -> ReportData:
  """Computes what a report shows.

  Args:
    embedder: the model.
    evaluation: queries and gallery.
    info: about the run.
    scores: by mode, what `evaluate_retrieval` returns; the others are compared
      with the first mode.
    results: the best results of every query, by mode: first before, then, if
      there is a second, after re-ranking.
    pictures: the same queries and gallery as uint8 images, where `evaluation`
      has features instead of images.
    vectors: by mode, what `embed_modes` returns: with `solo` and `neighbours`
      among them, a model with a causal graph is asked what one query would
      lose with each image of its context.
    neighbours: how many images that context has.
    queries: how many are shown, drawn at random.
    hits: how many results of each.
    hardest: how many of the hardest queries are shown, one of a class.
    hardest_hits: how many results of each.
    batch_classes: classes in the batch whose attention is shown.
    batch_images: images of each.
    resamples: resampled test sets behind the intervals.
    seed: of all that is drawn.

  Returns:
    What `write_report` needs.

  Raises:
    ValueError: results of no or of more than two modes are given, or scores
      or results are not of these queries.
  """
  number = len(evaluation.queries)
  labels = np.asarray(evaluation.queries.labels)
  _check(number, scores, results)
  scores = {mode: mask_scores(found) for mode, found in scores.items()}
  pictures = evaluation if pictures is None else pictures
  examples = Examples(pictures, scores, results)
  rng = np.random.default_rng(seed)
  chosen = rng.permutation(number)[:queries]
  batch = draw_batch(labels, rng, batch_classes, batch_images)
  nodes = draw_batch(labels, rng, _GRAPH_CLASSES, _GRAPH_IMAGES)
  causal = batch_graph(embedder, evaluation.queries, examples, nodes)
  what_if, vectors = None, vectors or {}
  if causal is not None and {'solo', 'neighbours'} <= vectors.keys():
    what_if = leave_each_out(
      embedder,
      evaluation,
      pictures,
      [int(q) for q in chosen],
      (vectors['solo'], vectors['neighbours']),
      neighbours=neighbours,
    )
  sample = rng.permutation(number)[:_SPARSE_IMAGES]
  names = list(results)
  return ReportData(
    title=info.title,
    description=info.description,
    facts=_facts(embedder, evaluation),
    modes=average_modes(scores, labels, resamples, seed),
    interval=INTERVAL.format(resamples=resamples) if scores else '',
    before=names[0],
    after=names[1] if len(names) > 1 else None,
    queries=tuple(examples.query(int(q), hits) for q in chosen),
    queries_choice='Queries are drawn at random, none is picked.',
    hardest=tuple(
      examples.query(q, hardest_hits) for q in examples.hardest(hardest)
    ),
    attention=batch_attention(embedder, evaluation.queries, examples, batch),
    causal=causal,
    what_if=what_if,
    sparse=where_it_looks(embedder, evaluation.queries, examples, sample),
    classes=recall_per_class(evaluation.queries, scores, names),
    panels=curve_panels(info.rows),
    configuration=flatten(info.configuration),
    environment=flatten(info.environment),
    command=info.command,
  )


def flatten(
  settings: Mapping[str, Any], *, prefix: str = ''
) -> tuple[tuple[str, str], ...]:
  """Nested settings as rows of a table.

  Args:
    settings: mappings may hold mappings.
    prefix: what stands before every name.

  Returns:
    (name, value) of every setting, names joined by dots.

  Example:
    >>> flatten({'optimizer': {'clip_norm': 1.0}, 'modes': ['solo']})
    (('optimizer.clip_norm', '1.0'), ('modes', 'solo'))
  """
  rows: list[tuple[str, str]] = []
  for key, value in settings.items():
    if isinstance(value, Mapping):
      rows.extend(flatten(value, prefix=f'{prefix}{key}.'))
    elif isinstance(value, list | tuple):
      rows.append((f'{prefix}{key}', ', '.join(str(part) for part in value)))
    else:
      rows.append((f'{prefix}{key}', '–' if value is None else str(value)))
  return tuple(rows)


def _check(
  number: int,
  scores: Mapping[str, Scores],
  results: Mapping[str, Neighbours],
) -> None:
  if not 1 <= len(results) <= 2:
    raise ValueError(
      f'results must be of one mode or two, before and after re-ranking, '
      f'got {list(results)}'
    )
  for mode, found in results.items():
    if len(found.indices) != number:
      raise ValueError(
        f'results of {mode} are of {len(found.indices)} queries, not {number}'
      )
  for mode, metrics in scores.items():
    for name, values in metrics.items():
      if len(values) != number:
        raise ValueError(
          f'{name} of {mode} is of {len(values)} queries, not {number}'
        )


def _facts(
  embedder: Embedder, evaluation: Evaluation
) -> tuple[tuple[str, str], ...]:
  queries, gallery = evaluation
  number = len(queries)
  leaves = jax.tree.leaves(embedder.params)
  return (
    ('Queries', f'{number:,}'),
    (
      'Gallery',
      f'the other {number - 1:,}' if gallery is None else f'{len(gallery):,}',
    ),
    ('Classes', f'{len(np.unique(queries.labels)):,}'),
    ('Parameters', f'{sum(leaf.size for leaf in leaves):,}'),
  )
