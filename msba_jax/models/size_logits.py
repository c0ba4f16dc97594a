"""A choice among sizes, by a number on their scale.

Attributes:
  SizeLogits: scores of sizes, of which inputs choose one.
  NeededSize: scores of sizes, by what is lost by the smaller ones.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from msba_jax.models.blocks import FeedForward, small_init

__all__ = ['NeededSize', 'SizeLogits']


class SizeLogits(nn.Module):
  r"""Scores of sizes, of which inputs choose one.

  A network says one number, the size z that is wanted in octaves, and scores
  fall off from there: −2 (log₂ c − z)² for a candidate c. Were each candidate
  scored by itself, a budget for the mean would be met by one that is ahead for
  all inputs, and nothing were left to tell them apart.

  z stays within half an octave of the candidates. A choice has to turn within a
  few hundred steps, in which Adam moves a weight by a fraction of one: the
  output counts tenfold.

  Attributes:
    hidden: width between.
    candidates: c, positive, ascending.
  """

  hidden: int
  candidates: Sequence[float]

  @nn.compact
  def __call__(self, inputs: Array, prior: Array) -> Array:
    """Scores of the candidates.

    Args:
      inputs: (…, d).
      prior: (…), the z to begin with.

    Returns:
      (…, k) in float32.
    """
    away = 10 * FeedForward(
      self.hidden, 1, outer_init=small_init, name='network'
    )(inputs).squeeze(-1).astype(jnp.float32)
    return _scores(away + prior - _middle(self.candidates), self.candidates)


class NeededSize(nn.Module):
  r"""Scores of sizes, by what is lost by the smaller ones.

  Who loses more wants a larger size: z = middle + 10 b + Σ_c softplus(s_c) t_c
  with t = ½ log(D + 0.001) + 1, from −2.5 for nothing to 1 for all. Where all
  begin to choose another size is learned, and how much each loss counts, but
  not which way: a network that is free to learn it may turn round while the
  budget moves everybody.

  Attributes:
    candidates: c, positive, ascending.
  """

  candidates: Sequence[float]

  @nn.compact
  def __call__(self, lost: Array) -> Array:
    """Scores of the candidates.

    Args:
      lost: D (…, k − 1), what each candidate but the largest loses to it.

    Returns:
      (…, k) in float32.
    """
    count = lost.shape[-1]
    told = jnp.log(lost.astype(jnp.float32) + 1e-3) / 2 + 1
    # Of all together one at first.
    begin = nn.initializers.constant(math.log(math.expm1(1 / count)))
    slopes = jax.nn.softplus(jnp.asarray(self.param('slopes', begin, (count,))))
    offset = self.param('offset', nn.initializers.zeros, ())
    return _scores(10 * jnp.asarray(offset) + told @ slopes, self.candidates)


def _middle(candidates: Sequence[float]) -> float:
  return (math.log2(candidates[0]) + math.log2(candidates[-1])) / 2


def _scores(away: Array, candidates: Sequence[float]) -> Array:
  """Of sizes (…, k), for z that is `away` (…) from the middle of them."""
  octaves = [math.log2(candidate) for candidate in candidates]
  reach = (octaves[-1] - octaves[0] + 1) / 2
  wanted = _middle(candidates) + reach * jnp.tanh(away / reach)
  return jnp.stack([-2 * (wanted - octave) ** 2 for octave in octaves], -1)
