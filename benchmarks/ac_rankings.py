"""What A and C are worth on rankings whose candidates were all trained.

    msba rank-backbones --candidates experiments/backbones.py:scenes-{…} \
      --trainings 13 --seed 0 --output ranking0
    python benchmarks/ac_rankings.py ranking0 ranking1 ranking2

Several rankings are those of several seeds: scores and performances are their
means. Predictions are those with the predicted candidate left out; the policy
is simulated on the candidates as they are and, as its control, on candidates
whose scores are exchanged at random.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from msba_jax.analysis.ac_policy import runs_until_found
from msba_jax.metrics import fit_ac


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('rankings', nargs='+', type=Path)
  parser.add_argument('--simulations', type=int, default=1000)
  parser.add_argument('--ridge', type=float, default=0.0)
  options = parser.parse_args()
  names, columns = read(options.rankings)
  ridge = options.ridge
  a, c, performance = columns.mean(axis=0)
  for place in np.argsort(-performance):
    print(
      f'{names[place]:30} A {a[place]:.4f} C {c[place]:.3f} '
      f'reached {100 * performance[place]:.1f}'
    )
  if len(columns) > 1:
    spread = np.std(columns, axis=0, ddof=1).mean(axis=1)
    between = [spearmanr(columns[0, 2], other[2])[0] for other in columns[1:]]
    print(
      f'deviation between seeds: A {spread[0]:.4f} C {spread[1]:.3f} '
      f'reached {100 * spread[2]:.1f}; Spearman of what the first seed '
      f'reached with the others: {np.round(between, 2)}'
    )
  fits = {'A': (a, None), 'C': (None, c), 'A and C': (a, c)}
  for kind, scores in fits.items():
    fit = fit_ac(*scores, performance, ridge=ridge)
    predicted = performance - fit.residuals
    rank = spearmanr(predicted, performance)[0]
    print(
      f'{kind}: R2 {fit.r_squared:.2f}, one left out '
      f'{fit.leave_one_out_r_squared:.2f}, Spearman of the prediction of one '
      f'left out {rank:.2f}'
    )
  for kind, score in (('A', a), ('C', c)):
    rank, chance = spearmanr(score, performance)
    print(f'{kind} itself: Spearman {rank:.2f} (p {chance:.2f})')
  runs, control = [], []
  for seed in range(options.simulations):
    rng = np.random.default_rng(seed)
    runs.append(runs_until_found(a, c, performance, rng=rng, ridge=ridge))
    order = rng.permutation(len(a))
    control.append(
      runs_until_found(a[order], c[order], performance, rng=rng, ridge=ridge)
    )
  for kind, found in (('policy', runs), ('scores exchanged', control)):
    print(
      f'{kind}: {np.mean(found):.2f} of {len(a)} trainings until the best is '
      f'in the first three; four are enough in '
      f'{100 * np.mean(np.array(found) <= 4):.1f} %'
    )


def read(directories):
  """Names, and A, C and performance by ranking and candidate."""
  columns, names = [], []
  for directory in directories:
    rows = json.loads((directory / 'ranking.json').read_text())['candidates']
    rows.sort(key=lambda row: row['name'])
    if any(row['measured'] is None for row in rows):
      raise SystemExit(f'{directory}: not all candidates were trained')
    if names and names != [row['name'] for row in rows]:
      raise SystemExit(f'{directory}: other candidates than {directories[0]}')
    names = [row['name'] for row in rows]
    columns.append(
      [
        [row[key] for row in rows]
        for key in ('alignment', 'correspondence', 'measured')
      ]
    )
  return names, np.array(columns)


if __name__ == '__main__':
  main()
