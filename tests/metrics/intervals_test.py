"""Tests of `msba_jax.metrics.intervals`."""

import numpy as np
import pytest

from msba_jax.metrics.intervals import bootstrap_interval, paired_bootstrap


def reference(values, groups, seed, resamples=1000):
  """Percentiles of resamples made by plain loops, float64."""
  generator = np.random.default_rng(seed)
  members = [np.flatnonzero(groups == label) for label in np.unique(groups)]
  means = []
  for _ in range(resamples):
    seeds = generator.integers(len(values), size=len(values))
    chosen = generator.integers(len(members), size=len(members))
    drawn = np.concatenate(
      [generator.choice(members[c], len(members[c])) for c in chosen]
    )
    means.append(values[seeds][:, drawn].mean())
  return np.quantile(means, [0.025, 0.975])


@pytest.mark.parametrize('seeds', [1, 4])
@pytest.mark.parametrize('grouped', [False, True])
def test_agrees_with_plain_loops(rng, seeds, grouped):
  groups = rng.integers(12, size=90) if grouped else np.arange(90)
  # What queries of a class or of a seed share is what grouping must widen.
  values = rng.random((seeds, 90)) + rng.normal(size=12)[groups % 12]
  values += rng.normal(size=(seeds, 1))
  found = bootstrap_interval(
    values, groups=groups if grouped else None, seed=1, resamples=4000
  )
  low, high = reference(values, groups, seed=2)
  width = high - low
  assert found.mean == pytest.approx(values.mean())
  assert found.low == pytest.approx(low, abs=0.1 * width)
  assert found.high == pytest.approx(high, abs=0.1 * width)


def test_each_level_widens_the_interval(rng):
  groups = np.repeat(np.arange(10), 20)
  values = 0.1 * rng.random((3, 200)) + rng.random(10)[groups]

  def width(values, groups=None):
    found = bootstrap_interval(values, groups=groups, seed=0)
    return found.high - found.low

  assert width(values, groups) > 2 * width(values)
  shifted = values + np.arange(3)[:, None]
  assert width(shifted, groups) > 2 * width(values, groups)


def test_covers_the_truth_as_often_as_it_says():
  generator = np.random.default_rng(3)
  covered = 0
  for trial in range(200):
    values = generator.normal(size=60)
    found = bootstrap_interval(
      values, seed=trial, resamples=400, confidence=0.8
    )
    covered += found.low <= 0 <= found.high
  assert 0.7 < covered / 200 < 0.88


def test_pairing_cancels_what_both_share(rng):
  shared = rng.random((3, 100))
  better = shared + 0.01 + 0.001 * rng.normal(size=shared.shape)
  groups = np.arange(100) % 7
  gain = paired_bootstrap(better, shared, groups=groups, seed=0)
  assert 0.009 < gain.low < gain.mean < gain.high < 0.011
  alone = bootstrap_interval(better, groups=groups, seed=0)
  assert alone.low < shared.mean()
  reverse = paired_bootstrap(shared, better, groups=groups, seed=0)
  np.testing.assert_allclose(
    reverse, (-gain.mean, -gain.high, -gain.low), rtol=1e-9
  )


def test_the_seed_decides(rng):
  values = rng.random((2, 50)).astype(np.float32)
  first, again, other = (
    bootstrap_interval(values, seed=seed) for seed in (0, 0, 1)
  )
  assert first == again
  assert first != other


def test_names_of_classes_and_their_order_do_not_matter(rng):
  values = rng.random(40)
  groups = np.repeat(np.array(['cat', 'dog', 'emu', 'fox']), 10)
  numbers = np.repeat(np.arange(4), 10)
  assert bootstrap_interval(values, groups=groups, seed=0) == (
    bootstrap_interval(values, groups=numbers, seed=0)
  )
  shuffled = np.concatenate([np.arange(1, 40, 2), np.arange(0, 40, 2)])
  found = bootstrap_interval(values[shuffled], groups=groups[shuffled], seed=0)
  assert found.mean == pytest.approx(values.mean())


def test_constant_values_have_no_width():
  assert bootstrap_interval(np.full((3, 9), 0.5), seed=0) == (0.5, 0.5, 0.5)
  assert bootstrap_interval(np.array([0.25]), seed=0) == (0.25, 0.25, 0.25)


@pytest.mark.usefixtures('unchecked')
def test_what_does_not_fit_is_named():
  values = np.ones((2, 5))
  for message, arguments, options in (
    (r'\(2, 0\)', (values[:, :0],), {}),
    ('1 of 2 values are not finite', (np.array([1.0, np.nan]),), {}),
    (r'\(4,\)', (values,), {'groups': np.zeros(4, int)}),
    ('resamples=0', (values,), {'resamples': 0}),
    ('confidence=95', (values,), {'confidence': 95}),
  ):
    with pytest.raises(ValueError, match=message):
      bootstrap_interval(*arguments, seed=0, **options)
  with pytest.raises(ValueError, match=r'\(5,\)'):
    paired_bootstrap(values, values[0], seed=0)
