r"""Choosing attention heads, image by image.

Attributes:
  head_alignment: how much each head looks where a graph says.
  prompt_tokens: the tokens of a point, a box or a mask.
  tokens_of_masks: the tokens of a mask of every image.
  prompt_alignment: how much each head looks at some tokens.
  select_heads: factors that keep the best heads.

Source of the idea: prompt-guided head selection (2025), arXiv 2504.01348; the
formula is that of this project.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from msba_jax.layers.choice import straight_through

__all__ = [
  'head_alignment',
  'prompt_alignment',
  'prompt_tokens',
  'select_heads',
  'tokens_of_masks',
]


def head_alignment(
  weights: Float[Array, '*b h n m'], influence: Float[Array, '*#b n m']
) -> Float[Array, '*b n h']:
  r"""s_nh = Σ_m A^h_nm G_nm.

  Args:
    weights: A, of every head.
    influence: G, such as `transitive_influence` of a graph.

  Returns:
    A score for each head of each image.
  """
  influence = jnp.broadcast_to(
    influence, (*weights.shape[:-3], *weights.shape[-2:])
  )
  return jnp.einsum('...hnm,...nm->...nh', weights, influence)


def prompt_tokens(
  grid: tuple[int, int],
  *,
  point: tuple[float, float] | None = None,
  box: tuple[float, float, float, float] | None = None,
  mask: Bool[np.ndarray, 'height width'] | None = None,
) -> Bool[np.ndarray, ' t']:
  """The tokens of a visual prompt: exactly one of a point, a box and a mask.

  Args:
    grid: rows and columns of the tokens.
    point: (y, x) from 0 to 1; the token it lies in.
    box: top, left, bottom, right from 0 to 1; the tokens it touches.
    mask: of any size; the tokens in which it is True anywhere.

  Returns:
    One Boolean a token, row by row; at least one is True.

  Raises:
    ValueError: not exactly one prompt, one outside of the image, an empty one.

  Example:
    >>> prompt_tokens((2, 2), point=(0.9, 0.1)).tolist()
    [False, False, True, False]
  """
  given = [
    name
    for name, x in (('point', point), ('box', box), ('mask', mask))
    if x is not None
  ]
  if len(given) != 1:
    raise ValueError(f'give exactly one of point, box and mask, not {given}')
  if point is not None:
    box = (*point, *point)
  found = np.zeros(grid, bool)
  if box is not None:
    top, left, bottom, right = box
    if not (0 <= top <= bottom <= 1 and 0 <= left <= right <= 1):
      raise ValueError(
        f'{given[0]}={point or box} must be (y, x) or (top, left, bottom, '
        'right), ascending, from 0 to 1'
      )
    rows = _touched(top, bottom, grid[0])
    found[rows, _touched(left, right, grid[1])] = True
  if mask is not None:
    if not np.any(mask):
      raise ValueError('mask is empty: it must be True somewhere')
    y, x = (_overlap(*sizes) for sizes in zip(grid, mask.shape, strict=True))
    found = y @ np.asarray(mask, bool) @ x.T
  return found.reshape(-1)


def tokens_of_masks(
  masks: Bool[Array, 'n height width'], grid: tuple[int, int]
) -> Bool[Array, 'n t']:
  """The tokens in which the mask of an image is True anywhere.

  Args:
    masks: of any size.
    grid: rows and columns of the tokens.

  Returns:
    One Boolean a token, row by row.
  """
  y, x = (
    jnp.asarray(_overlap(*sizes), jnp.float32)
    for sizes in zip(grid, masks.shape[1:], strict=True)
  )
  found = jnp.einsum('gh,nhw,vw->ngv', y, masks.astype(jnp.float32), x) > 0
  return found.reshape(len(masks), -1)


def prompt_alignment(
  weights: Float[Array, '*b h t s'], tokens: Bool[Array, '*#b s']
) -> Float[Array, '*b h']:
  """How much of the attention of a head lies inside of a prompt.

  Args:
    weights: of the tokens of an image; rows sum to one.
    tokens: as `prompt_tokens` gives them.

  Returns:
    From 0 to 1, the mean over the tokens that look.
  """
  tokens = jnp.broadcast_to(tokens, (*weights.shape[:-3], weights.shape[-1]))
  inside = jnp.where(tokens[..., None, None, :], weights, 0)
  return jnp.mean(jnp.sum(inside, axis=-1), axis=-1)


def select_heads(
  scores: Float[Array, '*b h'], keep: int
) -> Float[Array, '*b h']:
  r"""Factors of heads: h / keep for the best, zero for the others.

  Forward the choice is hard; backward the gradient is that of h · softmax of
  the scores (straight through). Of equal scores the first heads are kept.

  Args:
    scores: of the heads.
    keep: how many stay.

  Returns:
    Factors that sum to h.

  Raises:
    ValueError: there are fewer heads, or none shall stay.

  Example:
    >>> select_heads(jnp.array([0.1, 0.5, 0.2, 0.4]), 2).tolist()
    [0.0, 2.0, 0.0, 2.0]
  """
  heads = scores.shape[-1]
  if not 0 < keep <= heads:
    raise ValueError(f'{keep=} must be 1 to {heads}, the number of heads')
  scores = scores.astype(jnp.float32)
  chosen = jax.lax.top_k(scores, keep)[1]
  hard = jnp.sum(jax.nn.one_hot(chosen, heads), axis=-2) * (heads / keep)
  soft = heads * jax.nn.softmax(scores, axis=-1)
  return straight_through(hard, soft)


def _touched(low: float, high: float, size: int) -> slice:
  """The cells of `size` that an interval of [0, 1] touches."""
  first = min(int(low * size), size - 1)
  last = min(int(np.ceil(high * size)), size)
  return slice(first, max(last, first + 1))


def _overlap(cells: int, pixels: int) -> Bool[np.ndarray, 'cells pixels']:
  """Which of so many cells and pixels of one side share a part of it."""
  cell, pixel = np.arange(cells)[:, None], np.arange(pixels)[None]
  return (cell * pixels < (pixel + 1) * cells) & (
    pixel * cells < (cell + 1) * pixels
  )
