"""Attention in cross-shaped windows whose width each image chooses.

Attributes:
  CrossWindowAttention: heads look along rows, columns and both diagonals.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from msba_jax.layers.choice import (
  neighbouring_mixture,
  straight_through,
  switch_by_image,
)
from msba_jax.layers.depthwise import depthwise_convolution
from msba_jax.layers.window_attention import attend_windows
from msba_jax.layers.windows import stripe_windows
from msba_jax.models.blocks import (
  Attend,
  KeyProjection,
  queries_keys_values,
  split_heads,
)
from msba_jax.models.size_logits import NeededSize

__all__ = ['CrossWindowAttention']

# Tokens at which it is measured what narrow stripes lose.
ASKED = 16
DIRECTIONS = ('horizontal', 'vertical', 'diagonal', 'antidiagonal')


class CrossWindowAttention(nn.Module):
  """Self-attention in stripes of four directions, of a width chosen by image.

  Some heads look along rows, some along columns, some along each diagonal, in
  stripes of w tokens. What narrow stripes would lose of an image is measured at
  sixteen of its tokens, which attend in stripes of all candidates, and says
  which w it gets (`NeededSize`). Where there is a key 'dropout', as in
  training, the result is a mixture of the likeliest width and its likelier
  neighbour by a Gumbel softmax; elsewhere each image has one width, and only
  that is computed. To the messages a depthwise convolution of the values is
  added, for what is near.

  Attributes:
    heads: heads of each direction: rows, columns, diagonals, antidiagonals.
    widths: candidates, in tokens, ascending; a single one is not chosen. Wider
      ones than a grid are as wide as the grid.
    temperature: of the Gumbel softmax.
    qkv_features: width of all queries, keys and values together; None is that
      of the tokens.
    attend: the attention function inside of stripes, as `attend_windows` takes
      it; None is its own.
    keys: makes the module of the keys; None is a plain projection.

  Source: CSWin Transformer (2021), arXiv 2107.00652, for stripes and the
  convolution; diagonals and the choice are those of this project.
  """

  heads: Sequence[int] = (3, 3, 1, 1)
  widths: Sequence[int] = (2, 4, 8)
  temperature: float = 1.0
  qkv_features: int | None = None
  attend: Attend | None = None
  keys: KeyProjection | None = None

  @nn.compact
  def __call__(
    self, grid: Float[Array, 'n y x d']
  ) -> tuple[Float[Array, 'n y x d'], dict[str, Array]]:
    """Messages for every token.

    Args:
      grid: normalised tokens.

    Returns:
      The messages, and `widths` (n, k), how likely each candidate is; `stripe`
      (n,), the likeliest, in tokens; `grid` (2,), rows and columns; `heads`
      (4,), of each direction. Where a width is chosen, also `breadth` (n,), the
      likeliest over the widest, with the gradient of what is expected: a budget
      of it holds for what is computed in the end; and with a key 'dropout'
      `lost` (n, k), ‖m_w − m_W‖² / ‖m_W‖², what messages of each width lose to
      those of the widest, without gradient.

    Raises:
      ValueError: no head or no width, or the heads do not divide the width of
        the queries.
    """
    n, height, width, features = grid.shape
    if len(self.heads) != len(DIRECTIONS) or not sum(self.heads):
      raise ValueError(
        f'one number of heads for each of {DIRECTIONS}, not all zero: '
        f'{self.heads=}'
      )
    if not self.widths:
      raise ValueError('at least one width of stripes is needed')
    shape = height, width
    inner = self.qkv_features or features
    projected = queries_keys_values(
      grid.reshape(n, height * width, features), inner, self.keys, grid=shape
    )
    local = Nearby(name='local')(projected[2].reshape(n, *shape, inner))
    heads = tuple(split_heads(x, sum(self.heads)) for x in projected)
    if len(self.widths) == 1:
      messages = self._in_stripes(heads, shape=shape, stripe=self.widths[0])
      told = {'widths': jnp.ones((n, 1))}
    else:
      messages, told = self._chosen(heads, shape)
    messages = messages.reshape(local.shape) + local
    chosen = jnp.argmax(told['widths'], axis=-1)
    return nn.Dense(features, name='out')(messages), {
      **told,
      'stripe': jnp.asarray(self.widths)[chosen],
      'grid': jnp.asarray(shape),
      'heads': jnp.asarray(self.heads),
    }

  def _chosen(
    self, heads: tuple[Array, ...], shape: tuple[int, int]
  ) -> tuple[Array, dict[str, Array]]:
    """Messages of the width of each image, or of two, and what was chosen."""
    lost = self._lost_at_few(heads, shape)
    logits = NeededSize(tuple(map(float, self.widths)), name='width')(
      lost[:, :-1]
    )
    likely = jax.nn.softmax(logits, axis=-1)
    choice = jnp.argmax(logits, axis=-1)
    widths = jnp.minimum(jnp.asarray(self.widths), max(shape))
    shares = widths / widths[-1]
    told = {
      'widths': likely,
      'breadth': straight_through(shares[choice], likely @ shares),
    }
    branches = [
      functools.partial(self._in_stripes, shape=shape, stripe=stripe)
      for stripe in self.widths
    ]
    if not self.has_rng('dropout'):
      return switch_by_image(choice, branches, heads), told
    mixture = neighbouring_mixture(
      logits, key=self.make_rng('dropout'), temperature=self.temperature
    )
    messages = jnp.stack([branch(heads) for branch in branches])
    mixed = jnp.einsum(
      'nk,kn...->n...', mixture.astype(messages.dtype), messages
    )
    return mixed, {**told, 'lost': _distances(messages)}

  def _lost_at_few(
    self, heads: tuple[Array, ...], shape: tuple[int, int]
  ) -> Array:
    """What each width loses (n, k), measured at a few tokens."""
    places = spread_places(*shape, ASKED)
    return _distances(
      jnp.stack(
        [
          self._in_stripes(heads, shape=shape, stripe=stripe, places=places)
          for stripe in self.widths
        ]
      )
    )

  def _in_stripes(
    self,
    heads: tuple[Array, ...],
    *,
    shape: tuple[int, int],
    stripe: int,
    places: np.ndarray | None = None,
  ) -> Array:
    """Messages (n, t, h, d / h) of all directions at one width."""
    parts, start = [], 0
    for direction, count in zip(DIRECTIONS, self.heads, strict=True):
      if not count:
        continue
      windows = stripe_windows(*shape, direction=direction, stripe=stripe)
      queries, keys, values = (x[:, :, start : start + count] for x in heads)
      parts.append(
        attend_windows(
          queries, keys, values, windows, attend=self.attend, places=places
        )
      )
      start += count
    return jnp.concatenate(parts, axis=2)


class Nearby(nn.Module):
  """A depthwise 3 × 3 convolution, with a bias."""

  @nn.compact
  def __call__(self, grid: Array) -> Array:
    """(n, y, x, d) to the same shape."""
    features = grid.shape[-1]
    kernel = self.param(
      'kernel', nn.initializers.lecun_normal(), (3, 3, 1, features)
    )
    bias = self.param('bias', nn.initializers.zeros, (features,))
    convolved = depthwise_convolution(grid, jnp.asarray(kernel))
    return convolved + bias.astype(convolved.dtype).reshape(1, 1, 1, -1)


def spread_places(height: int, width: int, count: int) -> Int[np.ndarray, ' a']:
  """Tokens spread over a grid: `count` of them, or all where there are fewer.

  Rows follow each other evenly, columns by the golden ratio, so that no line of
  any direction has many of them.

  Args:
    height: rows.
    width: columns.
    count: how many are wanted.

  Returns:
    Their flat indices.
  """
  if height * width <= count:
    return np.arange(height * width)
  steps = np.arange(count) + 0.5
  rows = (steps * height / count).astype(int)
  columns = (steps * (math.sqrt(5) - 1) / 2 % 1 * width).astype(int)
  return np.unique(rows * width + columns)


def _distances(messages: Array) -> Array:
  """‖m_w − m_W‖² / ‖m_W‖² (n, k) to the last candidate, without gradient."""
  messages = jax.lax.stop_gradient(messages).astype(jnp.float32)
  axes = tuple(range(2, messages.ndim))
  apart = jnp.sum((messages - messages[-1:]) ** 2, axis=axes)
  return (apart / (jnp.sum(messages[-1:] ** 2, axis=axes) + 1e-12)).T
