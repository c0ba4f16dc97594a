"""Tests of `msba_jax.analysis.ac_policy`."""

import csv
from pathlib import Path

import numpy as np
import pytest

from msba_jax.analysis.ac_policy import (
  next_setting,
  predicted_order,
  runs_until_found,
)

TABLES = Path(__file__).parents[1] / 'fixtures' / 'law_of_vision'


def simulated(count):
  """Runs that the policy takes on each published benchmark, (8, count)."""
  rows = [
    list(csv.DictReader((TABLES / f'{name}.csv').read_text().splitlines()))
    for name in ('alignment', 'performance_and_correspondence')
  ]
  correspondence = np.array([float(row['C']) for row in rows[1]])
  return np.array(
    [
      [
        runs_until_found(
          np.array([float(row[name]) for row in rows[0]]),
          correspondence,
          np.array([float(row[name]) for row in rows[1]]),
          rng=np.random.default_rng(seed),
        )
        for seed in range(count)
      ]
      for name in rows[0][0]
      if name != 'setting'
    ]
  )


@pytest.mark.slow
def test_the_published_table_takes_about_three_runs():
  runs = simulated(300)  # 2,400 times
  assert runs.mean() == pytest.approx(3.2, abs=0.1)
  # Four runs find the best of 13 six times in seven, mean of 8 benchmarks.
  assert np.mean(runs <= 4) == pytest.approx(0.859, abs=0.02)


def test_cells_are_visited_before_any_twice(rng):
  grid = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(-1, 2)
  a, c = grid.T / 3
  trained = []
  for _ in range(16):
    trained.append(next_setting(a, c, trained, rng=rng))
  assert sorted(trained) == list(range(16))
  quarters = (grid // 2) @ (2, 1)
  assert sorted(quarters[trained[:4]]) == [0, 1, 2, 3]


def test_equal_settings_are_all_trained(rng):
  scores, trained = np.ones(3), []
  for _ in range(3):
    trained.append(next_setting(scores, scores, trained, rng=rng))
  assert sorted(trained) == [0, 1, 2]
  with pytest.raises(ValueError, match='all settings are trained'):
    next_setting(scores, scores, trained, rng=rng)


def test_choices_depend_on_the_generator_alone():
  a, c = np.random.default_rng(0).uniform(size=(2, 12))
  choose = [
    [next_setting(a, c, [], rng=np.random.default_rng(s)) for s in range(40)]
    for _ in range(2)
  ]
  assert choose[0] == choose[1]
  assert len(set(choose[0])) > 6


def test_order_follows_the_prediction(rng):
  a, c = rng.uniform(size=(2, 10))
  performance = a - 2 * c
  known = np.where(np.arange(10) < 7, performance, np.nan)
  found = predicted_order(a, c, known, rng=rng)
  np.testing.assert_array_equal(found, np.argsort(-performance))


def test_ties_are_broken_at_random():
  first = {
    predicted_order(
      *np.zeros((2, 4)), np.ones(4), rng=np.random.default_rng(seed)
    )[0]
    for seed in range(40)
  }
  assert first == {0, 1, 2, 3}


def test_a_best_that_is_never_predicted_takes_all_trainings(rng):
  # Two equal settings with opposite results: the polynomial cannot tell.
  a = np.array([0.0, 0.0, 0.5, 1.0, 1.0, 0.7])
  performance = np.array([1.0, -1.0, 0.5, 0.6, 0.7, 0.8])
  runs = [
    runs_until_found(a, a, performance, rng=rng, top=1) for _ in range(20)
  ]
  assert max(runs) == 6
