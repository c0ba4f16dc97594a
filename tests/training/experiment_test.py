"""Tests of `msba_jax.training.experiment`."""

import dataclasses

import flax.linen as nn
import pytest

from msba_jax.losses.term import LossTerm
from msba_jax.training.experiment import Experiment


@pytest.mark.parametrize(
  ('field', 'value'),
  [('steps', 0), ('seed', -1), ('ema_decay', 1.0), ('log_every', 0)],
)
def test_impossible_numbers_are_refused(field, value):
  made = Experiment(
    name='x',
    model=nn.Dense(3),
    losses=(LossTerm('zero', 1.0, lambda out, batch: out['solo']),),
    data=None,
  )
  with pytest.raises(ValueError, match=f'{field}={value}'):
    dataclasses.replace(made, **{field: value})
