"""Tests of `msba_jax.metrics.alignment`."""

import csv
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.metrics.alignment import ac_features, alignment_score, fit_ac

# Law of Vision Representation in MLLMs, arXiv 2408.16357, version 1: 13
# settings, 8 benchmarks, their A and C.
TABLES = Path(__file__).parents[1] / 'fixtures' / 'law_of_vision'
BENCHMARKS = (
  *('MMBench', 'MME', 'MMMU', 'OKVQA'),
  *('TextVQA', 'VizWiz', 'ScienceQA', 'SEED'),
)
VISION = ('MMBench', 'MME', 'OKVQA', 'SEED')
OCR = ('MMMU', 'TextVQA', 'VizWiz', 'ScienceQA')


def published():
  """Tables by column: alignment, and performance with C."""
  tables = []
  for name in ('alignment', 'performance_and_correspondence'):
    with (TABLES / f'{name}.csv').open() as lines:
      rows = list(csv.DictReader(lines))
    tables.append(
      {
        column: np.array([float(row[column]) for row in rows])
        for column in rows[0]
        if column != 'setting'
      }
    )
  return tables


@pytest.fixture
def fits():
  """By kind and benchmark: the published v1 fits."""
  alignment, table = published()
  return {
    kind: {
      name: fit_ac(
        alignment[name] if 'A' in kind else None,
        table['C'] if 'C' in kind else None,
        table[name],
      )
      for name in BENCHMARKS
    }
    for kind in ('A', 'C', 'AC')
  }


def mean(fits, names, field='r_squared'):
  return np.mean([getattr(fits[name], field) for name in names])


def test_published_fits(fits):
  assert mean(fits['A'], VISION) == pytest.approx(0.7656, abs=1e-3)
  assert mean(fits['C'], VISION) == pytest.approx(0.5691, abs=1e-3)
  assert mean(fits['AC'], VISION) == pytest.approx(0.9572, abs=1e-3)
  values = (0.9634, 0.9736, 0.8352, 0.9542, 0.9028, 0.8038, 0.8667, 0.9375)
  for name, value in zip(BENCHMARKS, values, strict=True):
    assert fits['AC'][name].r_squared == pytest.approx(value, abs=1e-3)


def test_published_fits_with_one_left_out(fits):
  left = 'leave_one_out_r_squared'
  for kind, vision, ocr in (('A', 0.654, 0.633), ('AC', 0.849, 0.536)):
    assert mean(fits[kind], VISION, left) == pytest.approx(vision, abs=1e-3)
    assert mean(fits[kind], OCR, left) == pytest.approx(ocr, abs=1e-3)


def test_a_polynomial_is_found(rng):
  a, c = rng.normal(size=(2, 20))
  performance = 1 + 2 * a - c + 0.5 * a * c + c**2
  fit = fit_ac(a, c, np.where(np.arange(20) < 9, performance, np.nan))
  assert fit.r_squared == pytest.approx(1)
  assert fit.leave_one_out_r_squared == pytest.approx(1)
  np.testing.assert_allclose(fit.predict(a, c), performance, rtol=1e-9)
  for end in fit.interval(a, c):
    np.testing.assert_allclose(end, performance, rtol=1e-6, atol=1e-6)


def test_fits_do_not_depend_on_units(rng):
  a, c, performance = rng.normal(size=(3, 12))
  fit = fit_ac(a, c, performance)
  other = fit_ac(3 * a - 1, 0.1 * c, 100 * performance + 7)
  for field in ('r_squared', 'leave_one_out_r_squared'):
    assert getattr(other, field) == pytest.approx(getattr(fit, field))
  np.testing.assert_allclose(
    other.predict(3 * a - 1, 0.1 * c), 100 * fit.predict(a, c) + 7
  )


def test_left_out_are_fits_without_one(rng):
  a, c, performance = rng.uniform(size=(3, 10))
  fit = fit_ac(a, c, performance)
  features = ac_features(*((x - x.min()) / np.ptp(x) for x in (a, c)))
  errors = []
  for i in range(10):
    kept = np.arange(10) != i
    solution = np.linalg.lstsq(features[kept], performance[kept], rcond=None)[0]
    errors.append(performance[i] - features[i] @ solution)
  np.testing.assert_allclose(fit.residuals, errors, rtol=1e-6)
  expected = 1 - np.sum(np.square(errors)) / (10 * np.var(performance))
  assert fit.leave_one_out_r_squared == pytest.approx(expected)


def test_few_settings_take_the_solution_of_least_norm(rng):
  a, c = rng.uniform(size=(2, 8))
  performance = np.full(8, np.nan)
  performance[[1, 4, 6]] = 0.2, 0.5, 0.3
  fit = fit_ac(a, c, performance)
  np.testing.assert_allclose(
    fit.predict(a, c)[[1, 4, 6]], (0.2, 0.5, 0.3), atol=1e-9
  )
  features = ac_features(*((x - x.min()) / np.ptp(x) for x in (a, c)))
  wanted = np.linalg.pinv(features[[1, 4, 6]]) @ np.array([0.0, 1.0, 1 / 3])
  np.testing.assert_allclose(fit.coefficients, wanted, atol=1e-9)


def test_a_ridge_leaves_the_constant_free(rng):
  a, c, performance = rng.uniform(size=(3, 10))
  fit = fit_ac(a, c, performance, ridge=0.3)
  features = ac_features(*((x - x.min()) / np.ptp(x) for x in (a, c)))
  values = (performance - performance.min()) / np.ptp(performance)
  penalty = 0.3 * np.diag([0.0, 1, 1, 1, 1, 1])
  wanted = np.linalg.solve(features.T @ features + penalty, features.T @ values)
  np.testing.assert_allclose(fit.coefficients, wanted, rtol=1e-9)
  constant = fit_ac(a, c, performance, ridge=1e9).predict(a, c)
  np.testing.assert_allclose(constant, performance.mean(), rtol=1e-6)


def test_one_setting_says_nothing_yet():
  scores = np.array([0.1, 0.2])
  fit = fit_ac(scores, None, np.array([0.4, np.nan]))
  assert np.isnan([fit.r_squared, fit.leave_one_out_r_squared]).all()
  lower, upper = fit.interval(scores, None)
  assert np.isinf([lower, upper]).all()


def test_intervals_hold_what_they_promise():
  rng = np.random.default_rng(1)
  held = []
  for _ in range(200):
    a, c = rng.uniform(size=(2, 30))
    performance = a + a * c + 0.2 * rng.normal(size=30)
    known = np.where(np.arange(30) < 12, performance, np.nan)
    lower, upper = fit_ac(a, c, known).interval(a, c, confidence=0.8)
    held.append(((lower <= performance) & (performance <= upper))[12:])
  assert 0.75 < np.mean(held) < 0.95


def test_alignment_equals_the_reference(rng, variant):
  tokens = rng.normal(size=(4, 5, 6)).astype('f4')
  references = rng.normal(size=(4, 3, 6)).astype('f4')
  mask = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
  expected = []
  for e, r, kept in zip(
    tokens.astype('f8'), references.astype('f8'), mask, strict=True
  ):
    cosines = [
      max(t @ s / np.linalg.norm(t) / np.linalg.norm(s) for s in r[kept])
      for t in e
      if kept.any()
    ]
    expected.append(np.mean(cosines) if cosines else 0.0)
  found = variant(lambda *a: alignment_score(*a[:2], mask=a[2]))(
    *map(jnp.asarray, (tokens, references, mask))
  )
  np.testing.assert_allclose(found, expected, atol=1e-6)
  whole = alignment_score(jnp.asarray(tokens), jnp.asarray(references))
  np.testing.assert_allclose(whole[0], expected[0], atol=1e-6)


def test_tokens_of_zero_align_with_nothing():
  found = alignment_score(jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3)))
  np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: alignment_score(jnp.ones((1, 0, 2)), jnp.ones((1, 1, 2))),
      'token',
    ),
    (lambda: fit_ac(None, None, np.ones(3)), 'one score or both'),
    (lambda: fit_ac(np.ones(2), None, np.ones(3)), 'as many as'),
    (lambda: fit_ac(np.array([np.nan]), None, np.ones(1)), 'not finite'),
    (lambda: fit_ac(np.ones(2), None, np.full(2, np.nan)), 'no setting has'),
    (
      lambda: fit_ac(np.ones(2), None, np.ones(2), ridge=-1.0),
      'must not be negative',
    ),
    (
      lambda: fit_ac(np.ones(2), None, np.ones(2)).predict(None, np.ones(2)),
      'those that were fitted',
    ),
    (
      lambda: fit_ac(np.ones(2), None, np.ones(2)).interval(
        np.ones(2), None, confidence=1.0
      ),
      'between 0 and 1',
    ),
  ],
)
def test_errors(call, message, unchecked):
  with pytest.raises(ValueError, match=message):
    call()
