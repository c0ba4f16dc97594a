r"""Choosing among a few candidates, image by image.

In training the candidates are mixed; at inference one is taken, and only that
one is computed.

Attributes:
  neighbouring_mixture: weights of two candidates that stand side by side.
  straight_through: one array forward, another one backward.
  switch_by_image: every image through the branch that it chose.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

__all__ = ['neighbouring_mixture', 'straight_through', 'switch_by_image']


def neighbouring_mixture(
  logits: Float[Array, '*b k'],
  *,
  key: PRNGKeyArray | None = None,
  temperature: float = 1.0,
) -> Float[Array, '*b k']:
  r"""Weights of the likeliest candidate and its likelier direct neighbour.

  p = softmax((logits + g) / temperature) with Gumbel noise g; of p stay the
  largest and the larger of the one or two beside it, divided by their sum. So
  an ordered choice, such as that of a width, moves in single steps, and at most
  two candidates need to be computed for an image.

  Args:
    logits: of the candidates, in their order.
    key: of the noise; None adds none.
    temperature: the smaller, the nearer to one candidate alone.

  Returns:
    Weights that sum to one in the dtype of the logits; at most two of a row are
    not zero, and these are adjacent. What has no weight has no gradient.

  Raises:
    ValueError: the temperature is not positive, or there is no candidate.

  Example:
    >>> logits = jnp.log(jnp.array([0.3, 0.1, 0.6]))
    >>> [round(x, 3) for x in neighbouring_mixture(logits).tolist()]
    [0.0, 0.143, 0.857]

  Source: Categorical Reparameterization with Gumbel-Softmax (2016), arXiv
  1611.01144; the limit to neighbours is ours.
  """
  count = logits.shape[-1] if logits.ndim else 0
  if not count:
    raise ValueError(f'{logits.shape=} has no candidates on its last axis')
  if temperature <= 0:
    raise ValueError(f'{temperature=} must be positive')
  scores = logits.astype(jnp.float32)
  if key is not None:
    scores = scores + jax.random.gumbel(key, scores.shape, jnp.float32)
  scores = scores / temperature
  place = jnp.arange(count).reshape((1,) * (scores.ndim - 1) + (count,))
  best = jnp.argmax(scores, axis=-1, keepdims=True)
  beside = jnp.abs(place - best) == 1
  second = jnp.argmax(
    jnp.where(beside, scores, -jnp.inf), axis=-1, keepdims=True
  )
  kept = (place == best) | (beside & (place == second))
  return jax.nn.softmax(scores, axis=-1, where=kept).astype(logits.dtype)


def straight_through(
  hard: Float[Array, '*b'] | Int[Array, '*b'] | Bool[Array, '*b'],
  soft: Float[Array, '*b'],
) -> Float[Array, '*b']:
  r"""The value of `hard` with the gradient of `soft`.

  Args:
    hard: a choice, such as a mask or one-hot vectors; gets no gradient.
    soft: what it was made from, finite.

  Returns:
    An array in the dtype of `soft`.

  Example:
    >>> f = lambda x: straight_through(x > 0.5, x**2)
    >>> [float(y) for y in jax.value_and_grad(f)(0.75)]
    [1.0, 1.5]

  Source: Estimating or Propagating Gradients Through Stochastic Neurons (2013),
  arXiv 1308.3432.
  """
  return _in_place_of(jax.lax.stop_gradient(hard).astype(soft.dtype), soft)


@jax.custom_jvp
def _in_place_of(hard: Array, soft: Array) -> Array:
  """Where nothing is differentiated, `soft` need not be computed."""
  del soft
  return hard


@_in_place_of.defjvp
def _tangent_of_soft(primals, tangents):
  return primals[0], tangents[1]


def switch_by_image(
  choice: Int[Array, ' n'],
  branches: Sequence[Callable[[Any], Any]],
  operands: Any,
  *,
  group: int = 4,
) -> Any:
  r"""Sends image i through branches[choice[i]] and through no other.

  Images of one choice are taken together, at most `group` at a time; the last
  ones of a choice are filled up with one of them. There are
  Σ_k ⌈count_k / group⌉ rounds for count_k images of choice k, so that only what
  was chosen is computed, while one compiled program serves all choices. A
  branch sees a group of a fixed size and treats its images one by one, so a
  result never depends on the other images of the batch.

  For inference: under `jit` the number of rounds is known at run time only, so
  there is no reverse-mode gradient. `vmap` computes all branches.

  Args:
    choice: a branch for each image; what is out of range is the nearest one.
    branches: functions of what `operands` is, with images on the leading axes;
      they agree in the shapes and dtypes of their results, whose leading axes
      are the images again, and have no effect of one image on another.
    operands: an array, or a tree of arrays, with n images on each leading axis.
    group: images of a round; a batch of fewer is one of its own size.

  Returns:
    What the branches give, n images on each leading axis.

  Raises:
    ValueError: there is no branch or no image, the group is not positive, or
      the shapes do not fit together.

  Example:
    >>> branches = [lambda x: -x, lambda x: 10 * x]
    >>> numbers = jnp.array([1.0, 2.0, 3.0])
    >>> switch_by_image(jnp.array([1, 0, 1]), branches, numbers).tolist()
    [10.0, -2.0, 30.0]
  """
  n = len(choice)
  group = _check(choice, branches, operands, group)
  choice = jnp.clip(choice, 0, len(branches) - 1)
  made = _described(branches, operands, group)
  if n == 1:
    return jax.lax.switch(choice[0], branches, operands)

  @jax.custom_vjp
  def switch(choice, operands):
    return _in_rounds(choice, branches, operands, made, group)

  def backward(residuals, cotangent):
    choice, operands = residuals
    _, pull = jax.vjp(
      lambda given: _selected(choice, [branch(given) for branch in branches]),
      operands,
    )
    return np.zeros(choice.shape, jax.dtypes.float0), *pull(cotangent)

  switch.defvjp(lambda *given: (switch(*given), given), backward)
  return switch(choice, operands)


def _in_rounds(choice, branches, operands, made, group: int) -> Any:
  """Groups of images of one choice, branch after branch."""
  n = len(choice)
  order = jnp.argsort(choice, stable=True)
  counts = jnp.sum(
    choice[:, None] == jnp.arange(len(branches))[None], axis=0, dtype=jnp.int32
  )
  ends = jnp.cumsum(counts)
  last_rounds = jnp.cumsum(-(-counts // group))

  def one_round(i, results):
    branch = jnp.sum(last_rounds <= i)
    # Rounds of this branch that are left, counted from its last image.
    rounds = -(-counts[branch] // group)
    first = ends[branch] - counts[branch]
    first = first + group * (i - (last_rounds[branch] - rounds))
    places = jnp.minimum(first + jnp.arange(group), ends[branch] - 1)
    images = order[places]
    given = jax.tree.map(lambda x: x[images], operands)
    found = jax.lax.switch(branch, branches, given)
    # An image that fills up writes what it wrote before.
    return jax.tree.map(lambda x, y: x.at[images].set(y), results, found)

  results = jax.tree.map(lambda x: jnp.zeros((n, *x.shape[1:]), x.dtype), made)
  return jax.lax.fori_loop(0, last_rounds[-1], one_round, results)


def _selected(choice: Array, results: Sequence[Any]) -> Any:
  """Of the results of all branches that of each image's own."""

  def select(*leaves: Array) -> Array:
    chosen = choice.reshape(-1, *(1,) * (leaves[0].ndim - 1))
    return jax.lax.select_n(jnp.broadcast_to(chosen, leaves[0].shape), *leaves)

  return jax.tree.map(select, *results)


def _described(branches, operands, group: int) -> Any:
  """Shapes of the results of a group, the same for all branches."""
  given = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((group, *x.shape[1:]), x.dtype), operands
  )
  made = [jax.eval_shape(branch, given) for branch in branches]
  kinds = [jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', x) for x in made]
  if any(kind != kinds[0] for kind in kinds):
    raise ValueError(f'branches give results of different shapes: {kinds}')
  if any(x.shape[:1] != (group,) for x in jax.tree.leaves(made)):
    raise ValueError(
      f'branches must give {group} results for {group} images: {kinds[0]}'
    )
  return made[0]


def _check(choice, branches, operands, group: int) -> int:
  if not branches:
    raise ValueError('branches must not be empty')
  if group < 1:
    raise ValueError(f'{group=} must be at least 1')
  shapes = [x.shape for x in jax.tree.leaves(operands)]
  if (
    choice.ndim != 1
    or not choice.size
    or not jnp.issubdtype(choice.dtype, jnp.integer)
  ):
    raise ValueError(
      f'choice must hold an integer for each image: {choice.shape=} '
      f'{choice.dtype=}'
    )
  if not shapes or any(shape[:1] != choice.shape for shape in shapes):
    raise ValueError(
      f'every operand needs {len(choice)} images on its leading axis: {shapes}'
    )
  return min(group, len(choice))
