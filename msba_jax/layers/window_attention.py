r"""Attention inside of windows or stripes of a grid.

Windows and heads are one axis while tokens are sorted into windows, so that one
transposition, or one gather, does both.

Attributes:
  attend_windows: every token over the tokens of its own windows.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from msba_jax.layers import attention
from msba_jax.layers.implementations import CHUNKED_SCORES
from msba_jax.layers.softmax import softmax_attended
from msba_jax.layers.windows import Windows, window_merge, window_partition

__all__ = ['attend_windows']

# Scores that stand in memory at once on CPU, and in a step of a loop over the
# others: larger arrays go back to the system every time, and getting them again
# costs more than the arithmetic.
MOST_SCORES = 6 * 2**20
STEP_SCORES = 3 * 2**20
# What is added to the score of a place without a token. Finite, so that no row
# needs to be guarded: XLA makes one kernel of the whole attention only then.
NO_TOKEN = -1e30


def attend_windows(
  queries: Float[Array, 'n t h d'],
  keys: Float[Array, 'n t h d'],
  values: Float[Array, 'n t h f'],
  windows: Windows,
  *,
  attend: Callable[..., Array] | None = None,
  places: Int[np.ndarray, ' a'] | None = None,
) -> Float[Array, 'n _ h f']:
  r"""Attention of every token over the tokens of the windows that it is in.

  o[t] = mean over the windows w with t of softmax_{s ∈ w}(q[t]·k[s]/√d) v[s].

  Args:
    queries: tokens of a grid, row-major, as they ask.
    keys: the same tokens as they answer.
    values: what is read from them.
    windows: w windows of s tokens each; places without a token are masked.
    attend: the attention inside windows, as
      `attend(queries, keys, values, mask=mask)` with (n, w, s, h, d) arrays and
      a mask that broadcasts to (n, w, h, s, s), or None. None is softmax
      attention, faster on small windows than `attend` of this library.
    places: the few tokens whose messages are wanted, for windows that do not
      overlap; they look at all tokens under a mask, `attend` with (n, t, h, d)
      arrays. None is all tokens, in their order.

  Returns:
    Messages in the dtype of the values; zero for a token that is in no window.

  Raises:
    ValueError: the shapes do not fit together, or the windows belong to a grid
      of another size, or overlap where places are given.

  Example:
    >>> tokens = jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> rows = Windows(np.array([[0, 1], [2, 3]]), np.ones((2, 2), bool), 4)
    >>> attend_windows(0 * tokens, tokens, tokens, rows).ravel().tolist()
    [0.5, 0.5, 2.5, 2.5]

  Source: Swin Transformer (2021), arXiv 2103.14030; CSWin Transformer (2021),
  arXiv 2107.00652.
  """
  if queries.shape != keys.shape or queries.shape[:-1] != values.shape[:-1]:
    raise ValueError(
      'queries, keys and values do not fit together: '
      f'{queries.shape=} {keys.shape=} {values.shape=}'
    )
  n, t, h, _ = queries.shape
  if t != windows.tokens:
    raise ValueError(
      f'the windows belong to {windows.tokens} tokens, not to {t}'
    )
  if places is not None:
    mask = jnp.asarray(_same_window(windows, places))
    return (attend or attention.attend)(
      queries[:, places], keys, values, mask=mask
    )
  apart = _heads_apart(windows, h)
  asking, answering, read = (
    window_partition(x.reshape(n, t * h, x.shape[-1]), apart)
    for x in (queries, keys, values)
  )
  if attend is None and windows.indices.shape[1] ** 2 < CHUNKED_SCORES:
    messages = _attend_small(asking, answering, read, apart)
  else:
    attend = attend or attention.attend
    messages = _attend_given(asking, answering, read, windows, attend)
  return window_merge(messages, apart).reshape(values.shape)


def _same_window(windows: Windows, places: np.ndarray) -> np.ndarray:
  """Which tokens (a, t) are in the window of each place."""
  found = windows.indices[windows.valid]
  if len(np.unique(found)) != len(found):
    raise ValueError('places need windows that do not overlap')
  window = np.full(windows.tokens, -1)
  window[found] = np.nonzero(windows.valid)[0]
  asking = window[places][:, None]
  return (asking == window) & (asking >= 0)


def _heads_apart(windows: Windows, heads: int) -> Windows:
  """Windows of tokens × heads, in which every window holds one head only."""
  if heads == 1:
    return windows
  shape = -1, windows.indices.shape[1]
  head = np.arange(heads)[None, :, None]
  return Windows(
    (windows.indices[:, None] * heads + head).reshape(shape),
    np.repeat(windows.valid, heads, axis=0),
    windows.tokens * heads,
  )


def _attend_given(
  queries: Array,
  keys: Array,
  values: Array,
  windows: Windows,
  attend: Callable[..., Array],
) -> Array:
  """Attention by a function that takes all heads of a window together."""
  count, size = windows.indices.shape
  queries, keys, values = (
    jnp.swapaxes(x.reshape(len(x), count, -1, *x.shape[2:]), 2, 3)
    for x in (queries, keys, values)
  )
  mask = None
  if not windows.valid.all():
    mask = jnp.asarray(windows.valid)[None, :, None, None]
  messages = jnp.swapaxes(attend(queries, keys, values, mask=mask), 2, 3)
  return messages.reshape(len(messages), -1, size, messages.shape[-1])


def _attend_small(
  queries: Array, keys: Array, values: Array, windows: Windows
) -> Array:
  """Softmax attention inside (n, w, s, d) windows, a few scores at a time."""
  n, count, size, d = queries.shape
  attended = functools.partial(softmax_attended, scale=1 / math.sqrt(d))
  if not windows.valid.all():
    bias = np.where(windows.valid[:, None], 0, NO_TOKEN)
    attended = functools.partial(attended, bias=jnp.asarray(bias, jnp.float32))
  image = count * size * size
  if jax.default_backend() != 'cpu' or n * image <= MOST_SCORES:
    return attended(queries, keys, values).messages
  rows = math.ceil(size / math.ceil(image / STEP_SCORES))
  steps = math.ceil(size / rows)

  def by_rows(arrays):
    queries, keys, values = arrays
    if steps == 1:
      return attended(queries, keys, values).messages
    queries = jnp.pad(queries, ((0, 0), (0, steps * rows - size), (0, 0)))
    queries = queries.reshape(count, steps, rows, -1)
    messages = jax.lax.map(
      lambda x: attended(x, keys, values).messages,
      jnp.moveaxis(queries, 1, 0),
    )
    messages = jnp.moveaxis(messages, 0, 1)
    return messages.reshape(count, steps * rows, -1)[:, :size]

  together = max(1, STEP_SCORES // image)
  arrays = queries, keys, values
  return jax.lax.map(by_rows, arrays, batch_size=together)
