"""Tests of `msba_jax.metrics.rank_metrics`."""

import numpy as np
import pytest

from msba_jax.metrics import rank_metrics
from msba_jax.metrics.ranks import ABSENT

RANKS = np.array([[2, 3, ABSENT], [1, 2, 3], [ABSENT, ABSENT, ABSENT]])


def test_values_worked_out_by_hand():
  for values, expected in (
    (rank_metrics.recall_at_k(RANKS, 1), [0, 1, 0]),
    (rank_metrics.recall_at_k(RANKS, 2), [1, 1, 0]),
    (rank_metrics.precision_at_k(RANKS, 4), [1 / 2, 3 / 4, 0]),
    (rank_metrics.r_precision(RANKS), [1 / 2, 1, 0]),
    (rank_metrics.map_at_r(RANKS), [1 / 4, 1, 0]),
    (rank_metrics.average_precision(RANKS), [(1 / 2 + 2 / 3) / 2, 1, 0]),
    (
      rank_metrics.average_precision(RANKS, convention='trapezoidal'),
      [((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2, 1, 0],
    ),
    (rank_metrics.positive_count(RANKS), [2, 3, 0]),
  ):
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.usefixtures('unchecked')
def test_an_unknown_convention_is_named():
  with pytest.raises(ValueError, match="'interpolated' must be one of"):
    rank_metrics.average_precision(RANKS, convention='interpolated')
