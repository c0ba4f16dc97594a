"""A choice among sizes, by a number on their scale.

Attributes:
  SizeLogits: scores of sizes, of which inputs choose one.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from msba_jax.models.blocks import FeedForward, small_init

__all__ = ['SizeLogits']


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
  def __call__(self, inputs: Array, prior: Array | None = None) -> Array:
    """Scores of the candidates.

    Args:
      inputs: (…, d).
      prior: (…), the z to begin with; None is the middle.

    Returns:
      (…, k) in float32.
    """
    octaves = [math.log2(candidate) for candidate in self.candidates]
    middle = (octaves[0] + octaves[-1]) / 2
    reach = (octaves[-1] - octaves[0] + 1) / 2
    away = 10 * FeedForward(
      self.hidden, 1, outer_init=small_init, name='network'
    )(inputs).squeeze(-1).astype(jnp.float32)
    if prior is not None:
      away = away + prior - middle
    wanted = middle + reach * jnp.tanh(away / reach)
    return jnp.stack([-2 * (wanted - octave) ** 2 for octave in octaves], -1)
