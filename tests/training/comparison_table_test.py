"""Tests of `msba_jax.training.comparison_table` and of the result files."""

import json

import numpy as np
import pytest

from msba_jax.data.errors import InputError
from msba_jax.training.comparison_table import comparison_rows, markdown_table
from msba_jax.training.results import (
  Outcome,
  outcome_path,
  read_outcome,
  scores_sha256,
  write_outcome,
)

LABELS = np.repeat(np.arange(6, dtype=np.int32), 10)


def outcome(name, seed, scores, **changes):
  return Outcome(
    experiment=name,
    configuration='0123456789abcdef',
    seed=seed,
    split='test',
    parameters=changes.pop('parameters', 1000),
    labels=changes.pop('labels', LABELS),
    scores=scores,
    record={'commit': None, 'environment': {'python': '3.11'}},
  )


@pytest.fixture
def outcomes(rng):
  """Two experiments, three seeds: the second is 0.1 better, query by query."""
  pairs = []
  for seed in range(3):
    solo = rng.random(60).astype(np.float32)
    near = (solo + 0.05).astype(np.float32)
    a = outcome('backbone', seed, {'solo': {'ap': solo}})
    b = outcome(
      'msba',
      seed,
      {'neighbours': {'ap': near + 0.1}, 'solo': {'ap': solo + 0.1}},
      parameters=1100,
    )
    pairs.append((a, b))
  return [list(runs) for runs in zip(*pairs, strict=True)]


def test_a_result_file_holds_every_score_to_the_bit(tmp_path, outcomes):
  written = outcomes[1][0]
  path = outcome_path(
    tmp_path, experiment='a b/c', configuration='f' * 64, seed=0, split='test'
  )
  assert path == tmp_path / 'a_b_c' / 'test-seed0-ffffffffffff.json'
  write_outcome(path, written)
  found = read_outcome(path)
  assert found._replace(labels=None, scores=None) == written._replace(
    labels=None, scores=None
  )
  np.testing.assert_array_equal(found.labels, written.labels)
  for mode, metrics in written.scores.items():
    np.testing.assert_array_equal(found.scores[mode]['ap'], metrics['ap'])
  assert scores_sha256(found) == scores_sha256(written)
  assert scores_sha256(found) != scores_sha256(outcomes[1][1])
  means = json.loads(path.read_text())['mean']
  assert means['solo']['ap'] == pytest.approx(
    written.scores['solo']['ap'].mean()
  )
  assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
  'damage',
  [
    lambda text: text[: len(text) // 2],
    lambda text: text.replace('"labels"', '"tables"'),
    lambda text: text.replace(
      '"solo": {\n   "ap": "', '"solo": {\n   "ap": "AA'
    ),
    lambda text: '[]',
  ],
)
def test_a_broken_result_file_is_named(tmp_path, outcomes, damage):
  path = tmp_path / 'result.json'
  write_outcome(path, outcomes[0][0])
  whole = path.read_text()
  path.write_text(damage(whole))
  assert path.read_text() != whole
  with pytest.raises(InputError, match=r'result\.json cannot be read'):
    read_outcome(path)


def test_an_interrupted_write_leaves_what_stood(tmp_path, outcomes):
  path = tmp_path / 'result.json'
  write_outcome(path, outcomes[0][0])
  before = path.read_bytes()
  unwritable = outcomes[0][1]._replace(record={'commit': object()})
  with pytest.raises(TypeError):
    write_outcome(path, unwritable)
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


def test_differences_are_paired(outcomes):
  first, solo, near = comparison_rows(outcomes, metrics=['ap'])
  assert [(row.experiment, row.mode) for row in (first, solo, near)] == [
    ('backbone', 'solo'),
    ('msba', 'solo'),
    ('msba', 'neighbours'),
  ]
  assert first.gains is None
  assert first.mode_gains is None
  assert solo.mode_gains is None
  # The scores vary much, their differences not at all.
  assert solo.values['ap'].high - solo.values['ap'].low > 0.05
  np.testing.assert_allclose(solo.gains['ap'], 0.1, atol=1e-6)
  np.testing.assert_allclose(near.gains['ap'], 0.15, atol=1e-6)
  np.testing.assert_allclose(near.mode_gains['ap'], 0.05, atol=1e-6)
  scores = [run.scores['solo']['ap'] for run in outcomes[1]]
  assert solo.values['ap'].mean == pytest.approx(np.mean(scores))
  assert solo.values['ap'].low < solo.values['ap'].mean < solo.values['ap'].high
  assert solo.seeds == (0, 1, 2)


def test_a_classifier_is_compared_with_a_classifier(outcomes):
  for runs, accuracy in zip(outcomes, (0.5, 0.75), strict=True):
    for run in runs:
      values = np.full(60, accuracy, np.float32)
      run.scores['classifier'] = {'ap': values}
  rows = comparison_rows(outcomes, metrics=['ap'])
  first, second = [row for row in rows if row.mode == 'classifier']
  assert first.gains is None
  np.testing.assert_allclose(second.gains['ap'], 0.25, atol=1e-6)
  assert first.mode_gains is None
  assert second.mode_gains is None


def test_queries_without_a_score_are_left_out(outcomes):
  for runs in outcomes:
    for run in runs:
      for metrics in run.scores.values():
        metrics['ap'][:10] = np.nan
  rows = comparison_rows(outcomes, metrics=['ap'])
  assert all(np.isfinite(row.values['ap']).all() for row in rows)
  scores = [run.scores['solo']['ap'][10:] for run in outcomes[0]]
  assert rows[0].values['ap'].mean == pytest.approx(np.mean(scores), rel=1e-6)


def test_the_table_is_markdown(outcomes):
  rows = comparison_rows(outcomes, metrics=['ap'])
  lines = markdown_table(rows, metric='ap').splitlines()
  assert len({line.count('|') for line in lines[:5]}) == 1
  assert '| backbone | solo |' in lines[2]
  assert '+10.0 [+10.0, +10.0]' in lines[3]
  assert '| 1,100 | 0 1 2 |' in lines[4]
  assert lines[-1] == 'Parameters beside backbone: msba +10.0%.'


def test_equal_parameters_need_no_note(outcomes):
  near = [[run._replace(parameters=1019) for run in outcomes[1]]]
  rows = comparison_rows([outcomes[0], *near], metrics=['ap'])
  assert 'Parameters beside' not in markdown_table(rows, metric='ap')


def test_what_cannot_be_compared_is_said(outcomes):
  with pytest.raises(InputError, match='--metrics recall@1 is not among'):
    comparison_rows(outcomes, metrics=['recall@1'])
  other = [run._replace(labels=LABELS[::-1]) for run in outcomes[1]]
  with pytest.raises(InputError, match='other queries than backbone'):
    comparison_rows([outcomes[0], other], metrics=['ap'])
  damaged = [run._replace(split='test-occlusion-3') for run in outcomes[1]]
  with pytest.raises(InputError, match='on test-occlusion-3, backbone on test'):
    comparison_rows([outcomes[0], damaged], metrics=['ap'])
