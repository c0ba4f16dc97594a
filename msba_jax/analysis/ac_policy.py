"""The AC policy: which of many settings to train, so that few are enough.

Settings are points (A, C), normalised to a square. Trainings are spread over
it: the square is cut into 4, 16, 64, … cells, and one setting is taken from a
cell in which none was trained yet.

Attributes:
  next_setting: what to train next.
  predicted_order: settings from the best to the worst, after some trainings.
  runs_until_found: simulates the policy on settings that were all trained.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64

from msba_jax.metrics.alignment import fit_ac, in_range

__all__ = ['next_setting', 'predicted_order', 'runs_until_found']

# Cells of 2⁻³⁰ of a side: settings that share one are one.
_DEEPEST = 30


def next_setting(
  alignment: Float[np.ndarray, ' n'],
  correspondence: Float[np.ndarray, ' n'],
  trained: Sequence[int],
  *,
  rng: np.random.Generator,
) -> int:
  """What to train next: a setting of a cell that holds no trained one.

  The coarsest cut is taken that has such a cell; the cell is random, and the
  setting in it too.

  Args:
    alignment: A of each setting.
    correspondence: C of each setting.
    trained: settings that are trained already.
    rng: makes the choice.

  Returns:
    Its place.

  Raises:
    ValueError: all settings are trained.

  Example:
    >>> a, c = np.array([0.0, 0.1, 0.9]), np.array([0.0, 0.1, 0.9])
    >>> next_setting(a, c, [0], rng=np.random.default_rng(0))
    2

  Source: Law of Vision Representation in MLLMs (2024), arXiv 2408.16357.
  """
  left = np.setdiff1d(np.arange(len(alignment)), np.asarray(trained, int))
  if not left.size:
    raise ValueError('all settings are trained')
  square = np.stack(
    [
      in_range(score, (float(score.min()), float(score.max())))
      for score in (alignment, correspondence)
    ],
    axis=1,
  )
  for level in range(1, _DEEPEST + 1):
    side = 2**level
    places = np.minimum((square * side).astype(np.int64), side - 1)
    cells = places[:, 0] * side + places[:, 1]
    free = left[~np.isin(cells[left], cells[np.asarray(trained, int)])]
    if free.size:
      cell = rng.choice(np.unique(cells[free]))
      return int(rng.choice(free[cells[free] == cell]))
  return int(rng.choice(left))


def predicted_order(
  alignment: Float[np.ndarray, ' n'],
  correspondence: Float[np.ndarray, ' n'],
  performance: Float[np.ndarray, ' n'],
  *,
  rng: np.random.Generator,
  ridge: float = 0.0,
) -> Int64[np.ndarray, ' n']:
  """Settings from the best prediction to the worst, ties in random order.

  Args:
    alignment: A of each setting.
    correspondence: C of each setting.
    performance: NaN for a setting that was not trained.
    rng: breaks ties.
    ridge: as in `fit_ac`.

  Returns:
    Places of the settings.
  """
  fit = fit_ac(alignment, correspondence, performance, ridge=ridge)
  predicted = fit.predict(alignment, correspondence)
  # Predictions that differ by rounding alone are ties.
  return np.lexsort((rng.random(len(predicted)), -predicted.round(9)))


def runs_until_found(
  alignment: Float[np.ndarray, ' n'],
  correspondence: Float[np.ndarray, ' n'],
  performance: Float[np.ndarray, ' n'],
  *,
  rng: np.random.Generator,
  top: int = 3,
  ridge: float = 0.0,
) -> int:
  """How many trainings the policy takes on settings that were all trained.

  Settings are trained one by one; from the second on, the polynomial is fitted
  to what is known and all settings are ranked by it.

  Args:
    alignment: A of each setting.
    correspondence: C of each setting.
    performance: of each setting, all known.
    rng: of the choices.
    top: the best setting must be among so many of the first.
    ridge: as in `fit_ac`.

  Returns:
    The number of trainings after which it is; that of all settings if it is
    not before the last one.
  """
  best, trained = int(np.argmax(performance)), list[int]()
  known = np.full(len(performance), np.nan)
  while len(trained) < len(performance) - 1:
    chosen = next_setting(alignment, correspondence, trained, rng=rng)
    trained.append(chosen)
    known[chosen] = performance[chosen]
    if len(trained) > 1:
      order = predicted_order(
        alignment, correspondence, known, rng=rng, ridge=ridge
      )
      if best in order[:top]:
        return len(trained)
  return len(performance)
