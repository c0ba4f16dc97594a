r"""What the message of an image would be without another, or with another.

Everything is float32 and takes leading batch axes.

Attributes:
  leave_one_out_effect: how much a message changes without an image.
  intervention_effect: how much it changes when an image is replaced.
  perturbed_features: random replacements.
  counterfactual_attention: weights that follow the effects.
  counterfactual_weights: weights that say nothing, for the effect loss.
  permuted_places: a random order of the images that are there.
  renormalized: rows that sum to one, or to less where there is nothing.

Source of the idea: Counterfactual Attention Learning (2021), arXiv 2108.08728;
the equations are those of this project.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msba_jax.layers.attention import weighted_sum
from msba_jax.layers.normalize import safe_normalize
from msba_jax.layers.softmax import softmax_or_zero

__all__ = [
  'counterfactual_attention',
  'counterfactual_weights',
  'intervention_effect',
  'leave_one_out_effect',
  'permuted_places',
  'perturbed_features',
  'renormalized',
]


def leave_one_out_effect(
  weights: Float[Array, '*b h n m'], values: Float[Array, '*b m h f']
) -> Float[Array, '*b n m']:
  r"""Squared change of the message of n when m leaves its context.

  Rows are renormalised over the images that stay, so that for o = Σ_m A_m v_m
  the message changes by A_m / (1 − A_m) (o − v_m), all of them in O(n m f). For
  the heaviest image of a row this loses all precision as A_m nears one, so that
  its message is summed over the others; an image that was looked at alone
  leaves zero.

  Args:
    weights: A, rows sum to one or zero.
    values: what is read.

  Returns:
    Squared norms over heads and features.
  """
  weights, values = (x.astype(jnp.float32) for x in (weights, values))
  # Differences do not see a shift, and small numbers cancel less. An image that
  # nobody looks at has no say in it.
  seen = jnp.any(weights > 0, axis=(-3, -2))[..., None, None]
  count = jnp.maximum(jnp.sum(seen, axis=-3, keepdims=True), 1)
  total = jnp.sum(jnp.where(seen, values, 0), axis=-3, keepdims=True)
  mean = total / count
  shifted = values - mean
  read = weighted_sum(weights, shifted)
  squares = (
    _squares(read)[..., None]
    + _squares(shifted)[..., None, :]
    - 2 * jnp.einsum('...nhf,...mhf->...hnm', read, shifted)
  )
  top = jnp.argmax(weights, axis=-1)
  heaviest = jax.nn.one_hot(top, weights.shape[-1], dtype=jnp.bool_)
  odds = jnp.where(heaviest, 0, weights / jnp.where(heaviest, 1, 1 - weights))
  changes = odds**2 * jnp.maximum(squares, 0)
  others = jnp.where(heaviest, 0, weights)
  rest = jnp.sum(others, axis=-1)
  stays = jnp.swapaxes(rest > 0, -1, -2)[..., None]
  scale = jnp.swapaxes(jnp.where(rest > 0, rest, 1), -1, -2)[..., None]
  # Alone it leaves zero, which lies at −mean.
  without = jnp.where(stays, weighted_sum(others, shifted) / scale, -mean)
  looks = jnp.swapaxes(jnp.any(weights > 0, axis=-1), -1, -2)[..., None]
  change = _squares(jnp.where(looks, without - read, 0))
  changes = jnp.where(heaviest, change[..., None], changes)
  return jnp.sum(changes, axis=-3)


def intervention_effect(
  weights: Float[Array, '*b h n m'],
  values: Float[Array, '*b m h f'],
  replaced: Float[Array, '*b m h f'],
) -> Float[Array, '*b n m']:
  r"""Squared change of the message of n when v_m becomes v'_m.

  The weights stay as they are, so that it is A_nm (v'_m − v_m).

  Args:
    weights: A.
    values: what is read.
    replaced: what takes the place of each value, one at a time.

  Returns:
    Squared norms over heads and features.
  """
  moved = jnp.sum((replaced - values).astype(jnp.float32) ** 2, axis=-1)
  return jnp.einsum('...hnm,...mh->...nm', weights**2, moved)


def perturbed_features(
  key: jax.Array, features: Float[Array, '*b d'], *, size: float = 0.1
) -> Float[Array, '*b d']:
  r"""F' = F + size · ‖F‖ · ε / ‖ε‖, with ε normal.

  Args:
    key: of the draw; `jax.vmap` over keys gives several.
    features: what is perturbed.
    size: length of the change over that of the features.

  Returns:
    As many features.
  """
  noise = jax.random.normal(key, features.shape, jnp.float32)
  length = jnp.linalg.norm(features.astype(jnp.float32), axis=-1, keepdims=True)
  change = size * jax.lax.stop_gradient(length) * safe_normalize(noise)
  return features + change.astype(features.dtype)


def counterfactual_attention(
  weights: Float[Array, '*b h n m'],
  effects: Float[Array, '*b n m'],
  *,
  temperature: Float[Array, ''] | float,
  mix: Float[Array, ''] | float,
  mask: Bool[Array, '...'] | None = None,
) -> Float[Array, '*b h n m']:
  r"""λ A + (1 − λ) softmax_m(Δ_nm / β), Δ over the mean of its row.

  Args:
    weights: A.
    effects: Δ ≥ 0, as `leave_one_out_effect` gives it.
    temperature: β > 0.
    mix: λ in [0, 1].
    mask: broadcasts to (*b, n, m); True takes part, as in A.

  Returns:
    Weights of every head; rows sum to one, or to zero where nothing takes part.
  """
  if mask is None:
    mask = jnp.ones((), jnp.bool_)
  mask = jnp.broadcast_to(mask, effects.shape)
  count = jnp.sum(mask, axis=-1, keepdims=True)
  mean = jnp.sum(jnp.where(mask, effects, 0), axis=-1, keepdims=True)
  relative = effects / (mean / jnp.maximum(count, 1) + 1e-12)
  scores = jnp.where(mask, relative / temperature, -jnp.inf)
  counterfactual = softmax_or_zero(jnp.expand_dims(scores, -3))
  return mix * weights + (1 - mix) * counterfactual


def counterfactual_weights(
  key: jax.Array,
  weights: Float[Array, '*b h n m'],
  *,
  kind: Literal['permuted', 'uniform', 'random'] = 'permuted',
  mask: Bool[Array, '...'] | None = None,
) -> Float[Array, '*b h n m']:
  """Weights that say nothing about whom an image depends on.

  Args:
    key: of the permutation or the draw.
    weights: A.
    kind: 'permuted' gives the weights of a row to other images, the same ones
      in every row; 'uniform' looks at all alike, 'random' draws.
    mask: broadcasts to A; True takes part.

  Returns:
    Weights; rows sum to one, or to less where next to nothing takes part.

  Raises:
    ValueError: there is no such kind.
  """
  if kind == 'permuted':
    found = weights[..., permuted_places(key, weights.shape[-1], mask=mask)]
  elif kind == 'uniform':
    found = jnp.ones_like(weights)
  elif kind == 'random':
    found = jax.random.uniform(key, weights.shape, minval=1e-3)
  else:
    raise ValueError(f"{kind=} must be 'permuted', 'uniform' or 'random'")
  if mask is not None:
    found = jnp.where(jnp.broadcast_to(mask, found.shape), found, 0)
  return renormalized(found)


def permuted_places(
  key: jax.Array, size: int, *, mask: Bool[Array, '...'] | None = None
) -> Int[Array, ' m']:
  """A random order of images, in which those that no row sees keep their place.

  Args:
    key: of the order.
    size: m, number of images.
    mask: broadcasts to (…, m); True takes part. None: all do.

  Returns:
    Places, each once.
  """
  seen = jnp.ones(size, jnp.bool_)
  if mask is not None:
    rows = jnp.broadcast_to(mask, (*mask.shape[:-1], size))
    seen = jnp.any(rows.reshape(-1, size), axis=0)
  draws = jax.random.uniform(key, (size,))
  shuffled = jnp.argsort(jnp.where(seen, draws, 2.0))
  rank = jnp.cumsum(seen) - 1
  return jnp.where(seen, shuffled[rank], jnp.arange(size))


def renormalized(
  rows: Float[Array, '*b m'], *, least: float = 1e-3
) -> Float[Array, '*b m']:
  """Rows divided by their sums, or by `least` where they sum to less.

  A row of next to nothing stays less than one, and its gradient finite.
  """
  total = jnp.sum(rows, axis=-1, keepdims=True)
  return rows / jnp.maximum(total, least)


def _squares(messages: Array) -> Array:
  """Squared norms (*b, h, n) of (*b, n, h, f)."""
  return jnp.swapaxes(jnp.sum(messages**2, axis=-1), -1, -2)
