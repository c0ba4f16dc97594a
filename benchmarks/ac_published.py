"""The published AC tables: fits, and the policy simulated on them.

    python benchmarks/ac_published.py [--simulations 1000] [--ridge 0.0]

13 settings and 8 benchmarks of Law of Vision Representation in MLLMs, arXiv
2408.16357, version 1, as they stand in tests/fixtures/law_of_vision.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from msba_jax.analysis.ac_policy import runs_until_found
from msba_jax.metrics import fit_ac

TABLES = Path(__file__).parents[1] / 'tests' / 'fixtures' / 'law_of_vision'
VISION = ('MMBench', 'MME', 'OKVQA', 'SEED')
OTHERS = ('MMMU', 'TextVQA', 'VizWiz', 'ScienceQA')


def column(table, name):
  with (TABLES / f'{table}.csv').open() as lines:
    return np.array([float(row[name]) for row in csv.DictReader(lines)])


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--simulations', type=int, default=1000)
  parser.add_argument('--ridge', type=float, default=0.0)
  options = parser.parse_args()
  simulations, ridge = options.simulations, options.ridge
  c = column('performance_and_correspondence', 'C')
  for names in (VISION, OTHERS):
    print(', '.join(names))
    given = [
      (column('alignment', x), column('performance_and_correspondence', x))
      for x in names
    ]
    fits = {
      'A alone': [fit_ac(a, None, y, ridge=ridge) for a, y in given],
      'C alone': [fit_ac(None, c, y, ridge=ridge) for _, y in given],
      'A and C': [fit_ac(a, c, y, ridge=ridge) for a, y in given],
    }
    for kind, found in fits.items():
      inside = np.mean([fit.r_squared for fit in found])
      outside = np.mean([fit.leave_one_out_r_squared for fit in found])
      print(f'  {kind}: R2 {inside:.4f}, one left out {outside:.4f}')
    runs = np.array(
      [
        [
          runs_until_found(
            a, c, y, rng=np.random.default_rng(seed), ridge=ridge
          )
          for seed in range(simulations)
        ]
        for a, y in given
      ]
    )
    print(
      f'  trainings until the best is in the first three: {runs.mean():.3f}; '
      f'four are enough in {100 * np.mean(runs <= 4):.1f} %'
    )


if __name__ == '__main__':
  main()
