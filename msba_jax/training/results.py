"""The result of one finished run, in one JSON file that holds every score.

Scores are kept for each query, so that intervals and paired differences can be
computed later, by people who do not have the model: float32, little-endian,
zlib, base64.

Attributes:
  Outcome: what a run reached.
  split_key: what the scores of a split are kept under.
  split_title: the same for a reader.
  outcome_path: where its file lies.
  write_outcome: writes it, whole or not at all.
  read_outcome: reads it back.
  scores_sha256: one hash of all scores, for comparing two runs.
"""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msba_jax.data.atomic import write_json
from msba_jax.data.corrupted import Corruption
from msba_jax.data.errors import InputError

__all__ = [
  'Outcome',
  'outcome_path',
  'read_outcome',
  'scores_sha256',
  'split_key',
  'split_title',
  'write_outcome',
]

_FORMAT = 1


class Outcome(NamedTuple):
  """What a run reached on one split.

  Attributes:
    experiment: its name.
    configuration: hash of everything that decided its numbers.
    seed: of the training.
    split: its images, and what was done to them; see `split_key`.
    parameters: how many numbers the model has.
    labels: class of each query, (q,) int32.
    scores: by mode, by metric: one number for each query, (q,) float32; NaN
      where the gallery has no image of its class.
    record: commit, machine, versions, overrides, times; JSON values.
  """

  experiment: str
  configuration: str
  seed: int
  split: str
  parameters: int
  labels: np.ndarray
  scores: Mapping[str, Mapping[str, np.ndarray]]
  record: Mapping[str, Any]


def split_key(split: str, corruption: Corruption | None = None) -> str:
  """What the scores of a split are kept under.

  Args:
    split: `validation`, `test` or `seen`.
    corruption: of its images.

  Returns:
    The split, and what was done to its images.

  Example:
    >>> split_key('test'), split_key('test', Corruption('occlusion', 3))
    ('test', 'test-occlusion-3')
  """
  if corruption is None:
    return split
  return f'{split}-{corruption.name}-{corruption.severity}'


def split_title(split: str, corruption: Corruption | None = None) -> str:
  """What a reader is told about the images that were scored.

  Args:
    split: `validation`, `test` or `seen`.
    corruption: of its images.

  Returns:
    The split, and what was done to its images.

  Example:
    >>> split_title('test'), split_title('test', Corruption('occlusion', 3))
    ('test', 'test, occlusion of severity 3')
  """
  if corruption is None:
    return split
  return f'{split}, {corruption.name} of severity {corruption.severity}'


def outcome_path(
  results: Path, *, experiment: str, configuration: str, seed: int, split: str
) -> Path:
  """Where the file of a run lies: its name says what decided the numbers.

  Args:
    results: the directory of all results.
    experiment: name of the experiment.
    configuration: its hash, see `configuration_hash`.
    seed: of the training.
    split: see `split_key`.

  Returns:
    `<results>/<experiment>/<split>-seed<seed>-<first digits of the hash>.json`.
  """
  plain = re.sub(r'[^\w.-]+', '_', experiment)
  return results / plain / f'{split}-seed{seed}-{configuration[:12]}.json'


def write_outcome(path: Path, outcome: Outcome) -> None:
  """Writes the file beside its goal and renames it, whole or not at all.

  Args:
    path: see `outcome_path`; what stands there is replaced.
    outcome: what to write.
  """
  content = {
    'format': _FORMAT,
    **outcome._asdict(),
    'mean': {
      mode: {
        name: float(np.nanmean(values)) for name, values in metrics.items()
      }
      for mode, metrics in outcome.scores.items()
    },
    'labels': _pack(np.asarray(outcome.labels, '<i4')),
    'scores': {
      mode: {
        name: _pack(np.asarray(values, '<f4'))
        for name, values in metrics.items()
      }
      for mode, metrics in outcome.scores.items()
    },
  }
  write_json(path, content)


def read_outcome(path: Path) -> Outcome:
  """Reads the file of a run.

  Args:
    path: as `write_outcome` left it.

  Returns:
    The outcome.

  Raises:
    InputError: the file is missing, or is not what was written.
  """
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
    labels = _unpack(content['labels'], '<i4')
    scores = {
      mode: {name: _unpack(text, '<f4') for name, text in metrics.items()}
      for mode, metrics in content['scores'].items()
    }
    fields = {
      name: content[name]
      for name in Outcome._fields
      if name not in ('labels', 'scores')
    }
    for metrics in scores.values():
      for name, values in metrics.items():
        if values.shape != labels.shape:
          raise ValueError(f'{name} has {values.size} scores')
    return Outcome(labels=labels, scores=scores, **fields)
  except (OSError, ValueError, KeyError, TypeError, zlib.error) as error:
    raise InputError(
      f'the result {path} cannot be read ({error}): delete it and run again'
    ) from error


def scores_sha256(outcome: Outcome) -> str:
  """One hash of all scores: two runs are equal to the bit, or they are not.

  Args:
    outcome: of a run.

  Returns:
    64 hexadecimal digits.
  """
  digest = hashlib.sha256(np.asarray(outcome.labels, '<i4').tobytes())
  for mode in sorted(outcome.scores):
    for name in sorted(outcome.scores[mode]):
      digest.update(f'{mode}\0{name}\0'.encode())
      digest.update(np.asarray(outcome.scores[mode][name], '<f4').tobytes())
  return digest.hexdigest()


def _pack(array: np.ndarray) -> str:
  return base64.b64encode(zlib.compress(array.tobytes(), 9)).decode('ascii')


def _unpack(text: str, dtype: str) -> np.ndarray:
  data = zlib.decompress(base64.b64decode(text, validate=True))
  return np.frombuffer(data, dtype)
