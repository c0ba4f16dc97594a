"""Attention that follows what an image would lose.

Attributes:
  CounterfactualAttention: weights mixed with those of leave-one-out effects.
"""

import math

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float

from msba_jax.layers.interventions import (
  counterfactual_attention,
  leave_one_out_effect,
)
from msba_jax.models.blocks import positive_parameter

__all__ = ['CounterfactualAttention']


class CounterfactualAttention(nn.Module):
  r"""λ A + (1 − λ) softmax_m(Δ_nm / β), with learned λ and β.

  Δ_nm is the effect of leaving image m out of the context of n. It is measured
  and not trained: no gradient passes through it.

  Attributes:
    mix: λ at first.
    temperature: β at first.
  """

  mix: float = 0.7
  temperature: float = 1.0

  @nn.compact
  def __call__(
    self,
    weights: Float[Array, '*b h n m'],
    values: Float[Array, '*b m h f'],
    mask: Bool[Array, '#n #m'],
  ) -> Float[Array, '*b h n m']:
    """Weights of the same shape, zero wherever they were masked."""
    logit = math.log(self.mix / (1 - self.mix))
    mix = self.param('mix', nn.initializers.constant(logit), ())
    effects = leave_one_out_effect(*jax.lax.stop_gradient((weights, values)))
    return counterfactual_attention(
      weights,
      effects,
      temperature=positive_parameter(self, 'temperature', self.temperature),
      mix=jax.nn.sigmoid(mix),
      mask=mask,
    )
