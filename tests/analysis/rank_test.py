"""Tests of `msba_jax.analysis.rank`, its picture and its command."""

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msba_jax import cli
from msba_jax.analysis import rank
from msba_jax.analysis.rank import rank_backbones
from msba_jax.analysis.ranking import Candidate, Ranking, Request
from msba_jax.analysis.ranking_picture import ranking_picture
from msba_jax.cli.rank_backbones import ranking_table
from msba_jax.data.directory import MANIFEST
from msba_jax.data.errors import InputError
from msba_jax.training.load import load_experiment

FILE = Path(__file__).parent / 'candidates.py'
CANDIDATES = tuple(f'{FILE}:{name}' for name in ('narrow', 'wide', 'last'))


def request(output, **changes):
  return Request(
    **{
      'candidates': CANDIDATES,
      'trainings': 2,
      'images': 24,
      'pairs': 8,
      'output': output,
      **changes,
    }
  )


@pytest.fixture(scope='module')
def ranked(tmp_path_factory):
  """A ranking, its directory and what was said."""
  output, said = tmp_path_factory.mktemp('ranking'), []
  found = rank_backbones(request(output), progress=False, say=said.append)
  return found, output, said


def test_as_many_are_trained_as_asked_for(ranked):
  found, output, said = ranked
  rows = {row.name: row for row in found.candidates}
  assert set(rows) == {'narrow', 'wide', 'last'}
  trained = [row for row in rows.values() if row.measured is not None]
  assert sorted(row.training for row in trained) == [1, 2]
  assert len(list((output / 'results').rglob('*.json'))) == 2
  assert len(list((output / 'scores').glob('*.json'))) == 3
  assert sum('training and scoring' in line for line in said) == 2


def test_rows_stand_in_the_order_of_what_is_expected(ranked):
  rows = ranked[0].candidates
  expected = [row.expected for row in rows]
  assert expected == sorted(expected, reverse=True)
  for row in rows:
    assert row.expected == (
      row.predicted if row.measured is None else row.measured
    )
    assert 0 <= row.in_top <= 1
    assert row.low <= row.high
  # Least norm through two points: what was trained is met.
  for row in rows:
    if row.measured is not None:
      assert row.predicted == pytest.approx(row.measured)


def test_what_stands_is_not_done_again(ranked, monkeypatch):
  found, output, _ = ranked

  def refuse(*_, **__):
    raise AssertionError('is done again')

  monkeypatch.setattr(rank, 'representation_scores', refuse)
  monkeypatch.setattr('msba_jax.training.compare.train', refuse)
  said = []
  again = rank_backbones(request(output), progress=False, say=said.append)
  assert again == found or repr(again) == repr(found)
  # One more training needs the scores that stand, and trains the one.
  with pytest.raises(AssertionError, match='done again'):
    rank_backbones(request(output, trainings=3), progress=False)


def test_a_warm_up_changes_the_scores_and_not_the_trainings(ranked, tmp_path):
  found = ranked[0]
  warm = rank_backbones(
    request(tmp_path, warm_up=2, trainings=1), progress=False
  )
  before = {row.name: row for row in found.candidates}
  for row in warm.candidates:
    assert row.alignment != before[row.name].alignment
    if row.measured is not None and before[row.name].measured is not None:
      assert row.measured == before[row.name].measured
  assert len(list((tmp_path / 'warm-up').iterdir())) == 3


def test_scores_belong_to_the_weights_that_a_directory_holds(tmp_path):
  experiment = load_experiment(CANDIDATES[0])
  frozen = dataclasses.replace(experiment, frozen_backbone=str(tmp_path))
  keys = set()
  for held in (None, '{"one": 1}', '{"two": 2}'):
    if held is not None:
      (tmp_path / 'weights').mkdir(exist_ok=True)
      (tmp_path / 'weights' / MANIFEST).write_text(held)
    for others in ([], [frozen]):
      key = rank._key(request(tmp_path), frozen, others)
      assert key == rank._key(request(tmp_path), frozen, others)
      keys.add(key)
  assert len(keys) == 6


def test_references_take_part(tmp_path):
  found = rank_backbones(
    request(tmp_path, trainings=1, references=(CANDIDATES[1],)), progress=False
  )
  for row in found.candidates:
    assert set(row.references) == {'classes', 'wide'}
  wide = next(row for row in found.candidates if row.name == 'wide')
  assert wide.references['wide'] == max(
    row.references['wide'] for row in found.candidates
  )


def test_a_broken_score_is_named(ranked):
  _, output, _ = ranked
  path = next((output / 'scores').glob('narrow-*.json'))
  whole = path.read_text()
  path.write_text(whole[:20])
  with pytest.raises(InputError, match=f'{path.name} cannot be read'):
    rank_backbones(request(output), progress=False)
  path.write_text(whole)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'candidates': CANDIDATES[:1]}, 'two experiments or more'),
    ({'trainings': 4}, '--trainings 4'),
    ({'trainings': 0}, '--trainings 0'),
    ({'images': 0}, '--images 0'),
    ({'pairs': 25}, '--pairs 25 must be at most'),
    ({'warm_up': -1}, '--warm-up -1'),
    ({'confidence': 1.0}, '--confidence 1.0'),
    ({'ridge': -1.0}, '--ridge -1.0'),
  ],
)
def test_requests_that_cannot_be(changes, message, tmp_path):
  with pytest.raises(InputError, match=message):
    request(tmp_path, **changes)


def test_two_candidates_of_one_name(tmp_path):
  with pytest.raises(InputError, match="are both named 'wide'"):
    rank_backbones(
      request(tmp_path, candidates=(CANDIDATES[1], CANDIDATES[1])),
      progress=False,
    )


def a_ranking():
  rows = [
    Candidate(
      name=f'number {i}',
      source='file.py',
      alignment=0.1 * i,
      correspondence=0.2,
      references={'classes': 0.1 * i},
      predicted=0.5 - 0.05 * i,
      low=-math.inf if i == 2 else 0.4 - 0.05 * i,
      high=math.inf if i == 2 else 0.6 - 0.05 * i,
      in_top=0.75,
      measured=0.456 if i == 1 else None,
      training=1 if i == 1 else None,
    )
    for i in range(3)
  ]
  fits = {'A and C': 0.9, 'A alone': math.nan, 'C alone': -0.1}
  return Ranking(tuple(rows), 'ap', fits, fits, ('number 2',), 0.8)


def test_the_table():
  lines = ranking_table(a_ranking()).splitlines()
  assert ' '.join(lines[1].split()) == (
    '1 number 0 0.000 0.200 50.00 [40.0, 60.0] 75 %'
  )
  assert lines[2].split()[-3:] == ['45.60', '75', '%']
  assert 'unknown' in lines[3]
  assert any(
    line.split() == ['A', 'alone', 'unknown', 'unknown'] for line in lines
  )
  assert lines[-1] == 'By A alone: number 2'


def test_the_picture_is_one():
  picture = Image.open(io.BytesIO(ranking_picture(a_ranking())))
  pixels = np.asarray(picture.convert('L'))
  assert min(picture.size) > 300
  assert pixels.std() > 10


def test_the_command(ranked, tmp_path, capsys):
  _, output, _ = ranked
  words = ['rank-backbones', '--candidates', *CANDIDATES]
  flags = {'trainings': 2, 'sample': 24, 'pairs': 8, 'output': output}
  for name, value in flags.items():
    words += [f'--{name}', str(value)]
  assert cli.main(words) == 0
  text = capsys.readouterr().out
  assert 'stand in' in text
  assert 'R² of the fit' in text
  content = json.loads((output / 'ranking.json').read_text())
  assert [row['name'] for row in content['candidates']]
  # Two trainings allow no interval of 80 %: no number in JSON's sense.
  assert content['candidates'][0]['low'] is None
  assert (output / 'ranking.png').read_bytes().startswith(b'\x89PNG')


def test_the_command_says_what_is_wrong(capsys, tmp_path):
  words = ['rank-backbones', '--candidates', *CANDIDATES, '--trainings', '9']
  assert cli.main([*words, '--output', str(tmp_path)]) == 2
  assert '--trainings 9' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_a_candidate_is_a_value():
  row = a_ranking().candidates[0]
  assert dataclasses.replace(row, measured=0.7).expected == 0.7
  assert row.expected == row.predicted
