"""The online softmax: rows of scores that come in pieces.

Attributes:
  Attended: messages and log-normalisers of all rows.
  begin_rows: what a row holds before its first score.
  add_scores: takes a piece of the scores of every row.
  finish_rows: messages and log-normalisers.
  merge_attended: what two shares of the keys make together.
  row_shift: what all scores of a row share in the gradient.
  scores_bounded: whether rows are safe without their largest score taken off.
  shifted_or_not: saves the pass for the largest score where that is safe.

Source: Online normalizer calculation for softmax (2018), arXiv 1805.02867.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

__all__ = [
  'Attended',
  'Rows',
  'add_scores',
  'begin_rows',
  'finish_rows',
  'merge_attended',
  'row_shift',
  'scores_bounded',
  'shifted_or_not',
]

# Scores below this bound are raised as they are: neither the sum of a row nor
# its largest term leaves the range of float32.
UNSHIFTED = 40.0

T = TypeVar('T')


class Attended(NamedTuple):
  """Messages, and the log of the sum of exponentials of every row.

  Attributes:
    messages: (g, n, f) in the dtype of the values.
    normalizer: (g, n) float32; −∞ for a row in which nothing takes part.
  """

  messages: Array
  normalizer: Array


class Rows(NamedTuple):
  """Rows of which some scores have been seen.

  Attributes:
    peak: the largest score so far, or 0 where scores are not shifted by it.
    total: sum of exp(score − peak).
    read: sum of exp(score − peak) · value.
  """

  peak: Array
  total: Array
  read: Array


def begin_rows(shape: tuple[int, ...], features: int, *, shifted: bool) -> Rows:
  """Rows without any score."""
  return Rows(
    jnp.full(shape, -jnp.inf if shifted else 0, jnp.float32),
    jnp.zeros(shape, jnp.float32),
    jnp.zeros((*shape, features), jnp.float32),
  )


def add_scores(
  rows: Rows,
  scores: Array,
  weigh: Callable[[Array], Array],
  *,
  shifted: bool,
) -> Rows:
  """Rows with more scores.

  Args:
    rows: what was seen so far.
    scores: the next piece of every row; −∞ does not take part.
    weigh: from exp(score − peak) to its sum over the values.
    shifted: whether the largest score is taken off.

  Returns:
    The rows with this piece.
  """
  peak, total, read = rows
  if shifted:
    peak = jnp.maximum(rows.peak, jnp.max(scores, axis=-1))
    # Messages and normalisers do not depend on what is taken off.
    peak = jax.lax.stop_gradient(peak)
    # A row of −∞ so far is shifted by zero: exp(−∞ − 0) is zero.
    shift = jnp.where(peak == -jnp.inf, 0, peak)
    scores = scores - shift[..., None]
    fade = jnp.exp(rows.peak - shift)
    total, read = total * fade, read * fade[..., None]
  raised = jnp.exp(scores)
  return Rows(peak, total + jnp.sum(raised, axis=-1), read + weigh(raised))


def finish_rows(rows: Rows, dtype: jnp.dtype) -> Attended:
  """Messages in a dtype, and log-normalisers; 0 and −∞ for an empty row."""
  alive = rows.total > 0
  total = jnp.where(alive, rows.total, 1)
  messages = (rows.read / total[..., None]).astype(dtype)
  normalizer = jnp.where(alive, jnp.log(total) + rows.peak, -jnp.inf)
  return Attended(messages, normalizer)


def merge_attended(total: Attended, part: Attended) -> Attended:
  """What two shares of the keys make together, in float32."""
  normalizer = jnp.logaddexp(total.normalizer, part.normalizer)
  # A row without keys so far is shifted by zero: exp(−∞ − 0) is zero.
  shift = jnp.where(normalizer == -jnp.inf, 0, normalizer)
  old, new = (
    jnp.exp(x.normalizer - shift)[..., None] * x.messages.astype(jnp.float32)
    for x in (total, part)
  )
  return Attended(old + new, normalizer)


def row_shift(attended: Attended, change: Attended) -> Array:
  """∂message · message − ∂normalizer of every row.

  A change of the normaliser and one of the messages meet in the same place:
  ∂score = weight · (∂message · value − shift).
  """
  messages = attended.messages.astype(jnp.float32)
  change_of_messages = change.messages.astype(jnp.float32)
  return jnp.sum(change_of_messages * messages, axis=-1) - change.normalizer


def scores_bounded(query: Array, key: Array, scale: float) -> Array:
  """Whether no score is so large or so small that its row needs a shift.

  The bound is the product of the largest norms.
  """
  largest = [
    jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1), initial=0)
    for x in (query, key)
  ]
  bound = abs(scale) * jnp.sqrt(largest[0]) * jnp.sqrt(largest[1])
  return bound < UNSHIFTED


def shifted_or_not(attend: Callable[[bool], T], bounded: bool | Array) -> T:
  """`attend(shifted)`, unshifted where scores are bounded.

  Both ways are compiled, and one of them runs, so this pays where branches are
  real, which they are on CPU and outside of `jax.vmap`.
  """
  return jax.lax.cond(bounded, lambda: attend(False), lambda: attend(True))
