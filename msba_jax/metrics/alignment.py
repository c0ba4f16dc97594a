r"""What a representation promises before a model is trained on it.

How well a representation agrees with references (A, alignment) and finds the
same place in two pictures (C, correspondence) predicts what a model reaches
that is trained on it: a polynomial of both, fitted to a few trained ones, ranks
the others.

Attributes:
  alignment_score: A, from tokens in a common space.
  correspondence_score: C, see `msba_jax.metrics.correspondence`.
  ac_features: all monomials of A and C to the second degree.
  ACFit: a fitted polynomial, with what it is worth.
  fit_ac: fits it by least squares.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64

from msba_jax.layers.normalize import safe_normalize
from msba_jax.metrics.correspondence import correspondence_score

__all__ = [
  'ACFit',
  'ac_features',
  'alignment_score',
  'correspondence_score',
  'fit_ac',
]


def alignment_score(
  tokens: Float[Array, 'n t d'],
  references: Float[Array, 'n s d'],
  *,
  mask: Bool[Array, 'n s'] | None = None,
) -> Float[Array, ' n']:
  r"""How closely the tokens of an image meet those of a reference.

      A = mean_t max_s cos(E_t, R_s)

  The A score of a representation is the mean over images and over several
  reference encoders, after both were brought into one space (`ridge_map`).

  Args:
    tokens: E, of the representation.
    references: R, of the reference, in the same space: tokens of another
      encoder, words, or the one target of an image's class.
    mask: which reference tokens there are; all by default.

  Returns:
    One number an image in [-1, 1], float32; zero without a reference token.

  Raises:
    ValueError: there are no tokens.

  Example:
    >>> tokens = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
    >>> references = jnp.array([[[3.0, 0.0], [1.0, 1.0]]])
    >>> [round(a, 4) for a in alignment_score(tokens, references).tolist()]
    [0.8536]

  Source: Law of Vision Representation in MLLMs (2024), arXiv 2408.16357.
  """
  if not tokens.shape[1] or not references.shape[1]:
    raise ValueError(
      f'there must be tokens: {tokens.shape=} {references.shape=}'
    )
  e, r = (safe_normalize(x.astype(jnp.float32)) for x in (tokens, references))
  cosines = jnp.einsum('ntd,nsd->nts', e, r, precision='highest')
  if mask is None:
    return jnp.mean(jnp.max(cosines, axis=2), axis=1)
  best = jnp.max(cosines, axis=2, where=mask[:, None], initial=-1.0)
  return jnp.where(mask.any(axis=1), jnp.mean(best, axis=1), 0.0)


def ac_features(
  *scores: Float[np.ndarray, ' n'],
) -> Float64[np.ndarray, 'n features']:
  """All monomials of the scores to the second degree, the constant first.

  Args:
    *scores: A and C of each setting, or one of them.

  Returns:
    1, A, C, A², AC, C² for two scores.

  Example:
    >>> ac_features(np.array([2.0]), np.array([3.0])).tolist()
    [[1.0, 2.0, 3.0, 4.0, 6.0, 9.0]]
  """
  columns = [np.asarray(score, np.float64) for score in scores]
  products = [
    one * other
    for place, one in enumerate(columns)
    for other in columns[place:]
  ]
  return np.stack([np.ones_like(columns[0]), *columns, *products], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class ACFit:
  """A polynomial of A and C that was fitted to performances.

  Attributes:
    r_squared: share of the variance of the performances that it explains. With
      six coefficients on a dozen settings it flatters.
    leave_one_out_r_squared: the same when each performance is predicted from
      the others; it may be negative, and is NaN for fewer than three.
    coefficients: of the normalised scores, in the order of `ac_features`.
    left_out: row i: the coefficients without the i-th performance.
    residuals: how far each performance is from its prediction by the others.
    ranges: smallest and largest value of each score, by which it is
      normalised; None for a score that is not used.
    scale: smallest performance and distance to the largest.
  """

  r_squared: float
  leave_one_out_r_squared: float
  coefficients: Float64[np.ndarray, ' features']
  left_out: Float64[np.ndarray, 'trained features']
  residuals: Float64[np.ndarray, ' trained']
  ranges: tuple[tuple[float, float] | None, tuple[float, float] | None]
  scale: tuple[float, float]

  def predict(
    self,
    alignment: Float[np.ndarray, ' n'] | None,
    correspondence: Float[np.ndarray, ' n'] | None,
  ) -> Float64[np.ndarray, ' n']:
    """The performance of settings, in the unit of those it was fitted to."""
    features = self._features(alignment, correspondence)
    return self.scale[0] + self.scale[1] * features @ self.coefficients

  def interval(
    self,
    alignment: Float[np.ndarray, ' n'] | None,
    correspondence: Float[np.ndarray, ' n'] | None,
    *,
    confidence: float = 0.8,
  ) -> tuple[Float64[np.ndarray, ' n'], Float64[np.ndarray, ' n']]:
    """Lower and upper ends of where the performance of settings will be.

    The jackknife+: predictions without each performance, widened by how wrong
    such a prediction was. Of few performances an interval of high confidence
    is infinite: n allow n / (n + 1) at most.

    Args:
      alignment: A of the settings.
      correspondence: C of the settings.
      confidence: that an interval holds the performance, if those trained and
        those asked for were drawn alike.

    Returns:
      (lower, upper), in the unit of the performances.

    Raises:
      ValueError: the confidence is not between 0 and 1.

    Source: Predictive Inference with the Jackknife+ (2019), arXiv 1905.02928.
    """
    if not 0 < confidence < 1:
      raise ValueError(f'{confidence=} must be between 0 and 1')
    features = self._features(alignment, correspondence)
    number = len(self.residuals)
    # Whole numbers may come out a rounding error too small.
    outside = int(np.floor((1 - confidence) * (number + 1) + 1e-9))
    if outside < 1:
      infinite = np.full(len(features), np.inf)
      return -infinite, infinite
    found = self.scale[0] + self.scale[1] * features @ self.left_out.T
    away = np.abs(self.residuals)
    lower = np.sort(found - away, axis=1)[:, outside - 1]
    upper = np.sort(found + away, axis=1)[:, number - outside]
    return np.minimum(lower, upper), np.maximum(lower, upper)

  def _features(
    self,
    alignment: Float[np.ndarray, ' n'] | None,
    correspondence: Float[np.ndarray, ' n'] | None,
  ) -> Float64[np.ndarray, 'n features']:
    scores = (alignment, correspondence)
    if [s is None for s in scores] != [r is None for r in self.ranges]:
      raise ValueError('the scores must be those that were fitted')
    return _features(scores, self.ranges)


def fit_ac(
  alignment: Float[np.ndarray, ' n'] | None,
  correspondence: Float[np.ndarray, ' n'] | None,
  performance: Float[np.ndarray, ' n'],
  *,
  ridge: float = 0.0,
) -> ACFit:
  r"""Fits performance as a polynomial of A and C to the second degree.

  Scores are normalised to [0, 1] over all settings, performances over those
  that were trained; below as many settings as coefficients, the solution of
  least norm is taken.

  Args:
    alignment: A of each setting, or None: C alone.
    correspondence: C of each setting, or None: A alone.
    performance: such as a mAP; NaN for a setting that was not trained.
    ridge: weight of the squared coefficients, but for the constant, beside the
      squared errors of normalised performances. Six coefficients on a dozen
      settings are more than these tell: a little of it predicts better.

  Returns:
    The fit.

  Raises:
    ValueError: no score or no performance is given, they are not as many, a
      score is not finite, or the ridge is negative.

  Example:
    >>> a, c = np.array([0.1, 0.5, 0.9, 0.3]), np.array([0.2, 0.8, 0.4, 0.6])
    >>> fit = fit_ac(a, c, np.array([1.0, 3.0, 2.0, np.nan]))
    >>> fit.predict(a, c)[:3].round(4).tolist()
    [1.0, 3.0, 2.0]

  Source: Law of Vision Representation in MLLMs (2024), arXiv 2408.16357.
  """
  scores = (alignment, correspondence)
  given = [score for score in scores if score is not None]
  if not given or any(len(score) != len(performance) for score in given):
    raise ValueError('one score or both, as many as performances')
  if not all(np.isfinite(score).all() for score in given):
    raise ValueError('a score is not finite')
  if ridge < 0:
    raise ValueError(f'{ridge=} must not be negative')
  trained = np.isfinite(performance)
  if not trained.any():
    raise ValueError('no setting has a performance')
  ranges = tuple(
    None if score is None else (float(np.min(score)), float(np.max(score)))
    for score in scores
  )
  features = _features(scores, ranges)[trained]
  values = np.asarray(performance, np.float64)[trained]
  low, width = float(values.min()), float(np.ptp(values)) or 1.0
  values = (values - low) / width
  everyone = np.arange(len(values))
  coefficients = _least_norm(features, values, ridge)
  left_out = np.stack(
    [
      _least_norm(features[everyone != i], values[everyone != i], ridge)
      for i in everyone
    ]
  )
  residuals = values - np.sum(features * left_out, axis=1)
  total = float(np.sum((values - values.mean()) ** 2))
  return ACFit(
    r_squared=_explained(values - features @ coefficients, total),
    leave_one_out_r_squared=(
      _explained(residuals, total) if len(values) > 2 else np.nan
    ),
    coefficients=coefficients,
    left_out=left_out,
    residuals=residuals * width,
    ranges=(ranges[0], ranges[1]),
    scale=(low, width),
  )


def _features(
  scores: Sequence[Float[np.ndarray, ' n'] | None],
  ranges: Sequence[tuple[float, float] | None],
) -> Float64[np.ndarray, 'n features']:
  """Monomials of the scores that there are, each in its range."""
  return ac_features(
    *(
      in_range(score, extent)
      for score, extent in zip(scores, ranges, strict=True)
      if score is not None and extent is not None
    )
  )


def in_range(
  score: Float[np.ndarray, ' n'], extent: tuple[float, float]
) -> Float64[np.ndarray, ' n']:
  """A score with the ends of a range at zero and one."""
  low, high = extent
  return (np.asarray(score, np.float64) - low) / ((high - low) or 1.0)


def _least_norm(
  features: Float64[np.ndarray, 'n features'],
  values: Float64[np.ndarray, ' n'],
  ridge: float,
) -> Float64[np.ndarray, ' features']:
  """Least squares, of all solutions that of least norm; the first is free."""
  if ridge:
    penalties = np.sqrt(ridge) * np.eye(features.shape[1])[1:]
    features = np.concatenate([features, penalties])
    values = np.concatenate([values, np.zeros(len(penalties))])
  return np.linalg.lstsq(features, values, rcond=None)[0]


def _explained(residuals: Float64[np.ndarray, ' n'], total: float) -> float:
  """R² of residuals; NaN where there is nothing to explain."""
  return 1 - float(np.sum(residuals**2)) / total if total > 0 else np.nan
