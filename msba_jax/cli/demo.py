"""Drawn scenes from end to end: train, evaluate, index, search, report.

Takes a few minutes on two CPU cores. What stands is not done again: a second
run, or one after an interruption, goes on where the first one ended.

Attributes:
  Options: the flags of `msba demo`.
  run: runs what does not stand yet, and says where everything is.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
  from msba_jax.retrieval.index import Index
  from msba_jax.training.run import Run

EXAMPLES = """\
  msba demo
  msba demo --directory elsewhere
"""
INTERRUPTED = 'What stands is kept; `msba demo` goes on from there.'

T = TypeVar('T')
EXPERIMENT = 'msba_jax.training.demo_experiment'
# Held out of the index, so that no query finds itself.
QUERY = 0
RESULTS = 10


@dataclass(frozen=True)
class Options:
  """Flags of `msba demo`."""

  directory: Path = Path('demo')
  """Where everything is put."""


def run(options: Options) -> int:
  """Runs what does not stand yet; 0 when the report stands."""
  from msba_jax.training.load import load_experiment
  from msba_jax.training.loop import train

  directory = options.directory
  experiment = load_experiment(
    EXPERIMENT, ['--data.data-dir', str(directory / 'data')]
  )
  started = time.monotonic()
  splits = _stage(1, 'scenes', lambda: experiment.data.open())
  trained = _stage(2, 'train', lambda: train(experiment, directory / 'run'))
  record = _Record(directory / 'done.json', trained.fingerprint)
  _stage(3, 'evaluate', lambda: _evaluate(trained, record))
  index = _stage(
    4, 'index', lambda: _index(directory / 'index', trained, splits.test)
  )
  _stage(
    5,
    'search',
    lambda: _search(directory, trained, index, splits.test, record),
  )
  _stage(6, 'report', lambda: _report(directory, trained, record))
  print(f'\nDone in {time.monotonic() - started:.0f} s. Look at')
  print(f'  {(directory / "report.html").resolve()}')
  print(f'  {(directory / "search.png").resolve()}')
  print('Try')
  print(
    f'  msba search {directory / "query.png"} --index {directory / "index"} '
    f'--run {directory / "run"} --mode neighbours'
  )
  return 0


class _Record:
  """Which stages are done with which model, in a file."""

  def __init__(self, path: Path, fingerprint: str):
    self._path = path
    self._fingerprint = fingerprint
    try:
      self._done: dict[str, str] = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
      self._done = {}

  def stands(self, stage: str, *outputs: Path) -> bool:
    """Whether a stage was done with this model, and its outputs are there."""
    done = self._done.get(stage) == self._fingerprint
    return done and all(output.exists() for output in outputs)

  def note(self, stage: str) -> None:
    """Notes that a stage is done."""
    from msba_jax.data.atomic import write_atomically

    self._done[stage] = self._fingerprint
    write_atomically(self._path, json.dumps(self._done, indent=1).encode())


def _stage(number: int, name: str, work: Callable[[], T]) -> T:
  """Says what begins, does it, says how long it took."""
  print(f'[{number}/6] {name}', flush=True)
  started = time.monotonic()
  result = work()
  print(f'[{number}/6] {name}: {time.monotonic() - started:.1f} s', flush=True)
  return result


def _evaluate(trained: 'Run', record: _Record) -> None:
  """Scores the test classes in every mode, and prints the table."""
  from msba_jax.cli.evaluate import score_table
  from msba_jax.training.run import evaluate_run

  path = trained.directory / 'evaluation.json'
  if not record.stands('evaluate', path):
    evaluate_run(trained, split='test')
    record.note('evaluate')
  scores = json.loads(path.read_text())['test']['scores']
  print('test classes, per cent')
  print(score_table(scores))


def _index(directory: Path, trained: 'Run', test) -> 'Index':
  """An index of all test scenes but one."""
  from msba_jax.data.errors import InputError
  from msba_jax.data.source import SubsetSource
  from msba_jax.retrieval.index import build_index, open_index

  gallery = SubsetSource(
    test.queries,
    [i for i in range(len(test.queries)) if i != QUERY],
    classes=range(len(test.queries.class_names)),
  )
  try:
    index = open_index(directory, trained.fingerprint)
    if index.regions is not None and index.ids == tuple(gallery.ids):
      return index
  except InputError:
    pass  # there is none yet, or it is another model's
  return build_index(directory, trained.embedder, gallery, regions=True)


def _search(
  directory: Path, trained: 'Run', index: 'Index', test, record: _Record
) -> None:
  """Searches with the scene that was held out; prints and draws the results."""
  import io

  import numpy as np
  from PIL import Image

  from msba_jax.data.atomic import write_atomically
  from msba_jax.retrieval.index import search_index
  from msba_jax.retrieval.report.picture import results_picture

  picture, query = directory / 'search.png', directory / 'query.png'
  if record.stands('search', picture, query):
    return
  asked = test.queries[QUERY]
  encoded = io.BytesIO()
  Image.fromarray(asked['image']).save(encoded, 'PNG')
  write_atomically(query, encoded.getvalue())
  found = search_index(
    index,
    trained.embedder,
    asked['image'][None],
    RESULTS,
    mode='neighbours',
    neighbours=trained.experiment.evaluation.neighbours,
    progress=False,
  )
  rows = found.indices[0]
  assert index.labels is not None
  for row, score in zip(rows, found.scores[0], strict=True):
    name = index.class_names[index.labels[row]]
    print(f'  {score:.4f}  {index.ids[row]}  {name}')
  results_picture(
    asked['image'],
    [
      np.asarray(Image.open(io.BytesIO(index.thumbnails[int(row)])))
      for row in rows
    ],
    [bool(index.labels[row] == asked['label']) for row in rows],
    found.scores[0],
    picture,
    ids=[index.ids[row] for row in rows],
    query_id=test.queries.ids[QUERY],
  )
  record.note('search')


def _report(directory: Path, trained: 'Run', record: _Record) -> None:
  """The page about the run, on the test classes."""
  from msba_jax.training.report import report_run

  page = directory / 'report.html'
  if not record.stands('report', page):
    report_run(trained, page, split='test')
    record.note('report')
