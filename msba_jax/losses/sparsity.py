r"""The objective of NEXUS, as terms: how much is kept, and how well.

Attributes:
  ratio_loss: twice the squared distance of the kept share from its target.
  kept_mass_loss: divergence of sparse rows from dense ones.
  narrowing_loss: narrow stripes are for those who lose least by them.
  nexus_losses: the objective of MSBA and these.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msba_jax.losses.objective import check_weight, msba_losses
from msba_jax.losses.reduction import masked_mean
from msba_jax.losses.term import LossTerm

__all__ = ['kept_mass_loss', 'narrowing_loss', 'nexus_losses', 'ratio_loss']

# What a row that keeps nothing counts as kept: its loss is −log of this.
LEAST = 1e-6


def ratio_loss(
  kept: Float[Array, '*shape'] | Bool[Array, '*shape'],
  target: float,
  *,
  valid: Bool[Array, '*shape'] | None = None,
) -> Float[Array, '']:
  r"""2 (mean M − ρ*)², a scalar: the mean of all, not of each, has a target.

  So an image may keep more than another, as long as they keep ρ* together.

  Args:
    kept: M, a mask or shares, with the gradient they were given.
    target: ρ*.
    valid: False is left out of the mean. None: everything takes part.

  Returns:
    A scalar, at least float32; zero where nothing is valid.

  Raises:
    ValueError: the target is not a share, or `valid` has another shape.
    TypeError: `valid` is not Boolean.

  Example:
    >>> float(ratio_loss(jnp.array([1.0, 0.5]), 0.25))
    0.5

  Source: DynamicViT: Efficient Vision Transformers with Dynamic Token
  Sparsification (2021), arXiv 2106.02034.
  """
  if not 0 < target <= 1:
    raise ValueError(f'{target=} must be above 0 and at most 1')
  if kept.dtype == jnp.bool_:
    kept = kept.astype(jnp.float32)
  away = masked_mean(kept, valid) - target
  if valid is not None:
    away = jnp.where(jnp.any(valid), away, 0)
  return 2 * away**2


def kept_mass_loss(
  weights: Float[Array, '*b n m'],
  kept: Float[Array, '*#b n m'] | Bool[Array, '*#b n m'],
  *,
  means: Float[Array, '*#b n m'] | None = None,
  valid: Bool[Array, '*b n'] | None = None,
) -> Float[Array, '*b n']:
  r"""KL(sparse‖dense) = −log (Σ_j A_ij M_ij / Σ_j A_ij), unreduced over rows.

  The sparse row is the dense one without what is not kept, over what remains
  of its sum, so their ratio is the same wherever it is not zero, and its
  logarithm is all that the divergence holds. The other direction is infinite:
  the sparse row is zero where the dense one is not. A millionth is added to
  both sums, so that a row that keeps nothing costs 13.8.

  Where j is a block that is left to its mean and not left out, as in
  `layers.attend_blocks_and_means`, it keeps the weight C_ij of its mean, and
  the divergence is −log (Σ_j A_ij M_ij + C_ij (1 − M_ij)) / Σ_j A_ij.

  Args:
    weights: A, dense rows.
    kept: M, Boolean, or numbers that have a gradient.
    means: C, at most A. None: what is not kept has no weight.
    valid: False for rows that count zero, such as those of padding.

  Returns:
    One loss a row, float32 at least; zero where all is kept, and for a row of
    zeros.

  Raises:
    ValueError: the shapes disagree.
    TypeError: `valid` is not Boolean.

  Example:
    >>> weights = jnp.array([[0.5, 0.25, 0.25]])
    >>> losses = kept_mass_loss(weights, jnp.array([[True, False, False]]))
    >>> round(losses.item(), 4)
    0.6931
  """
  if valid is not None:
    if valid.shape != weights.shape[:-1]:
      raise ValueError(
        f'valid must be one per row: {valid.shape=} {weights.shape=}'
      )
    if valid.dtype != jnp.bool_:
      raise TypeError(f'valid must be Boolean, True takes part: {valid.dtype=}')
    weights = jnp.where(valid[..., None], weights, 0)
  weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
  kept = jnp.broadcast_to(kept, weights.shape).astype(weights.dtype)
  if valid is not None:
    kept = jnp.where(valid[..., None], kept, 0)
    if means is not None:
      means = jnp.where(valid[..., None], means, 0)
  remains = weights * kept
  if means is not None:
    remains = remains + means * (1 - kept)
  mass, total = jnp.sum(remains, axis=-1), jnp.sum(weights, axis=-1)
  there = total > 0
  share = (mass + LEAST) / (jnp.where(there, total, 1) + LEAST)
  return jnp.where(there, -jnp.log(jnp.where(there, share, 1)), 0)


def narrowing_loss(
  likely: Float[Array, '*l n k'],
  lost: Float[Array, '*l n k'],
  *,
  valid: Bool[Array, ' n'] | None = None,
) -> Float[Array, '']:
  r"""mean_i Σ_w p_iw (D_iw − mean_j D_jw), a scalar.

  An image that loses more by a candidate than the others shall be less likely
  to choose it. Without the mean over images all would be drawn to the widest;
  with it, how much they spend together is left to a budget, such as
  `ratio_loss`, and this says who spends it.

  Args:
    likely: p, how likely each image chooses each candidate.
    lost: D, what the image loses by it; gets no gradient.
    valid: False is an image of padding. None: all take part.

  Returns:
    A scalar in float32, the mean over leading axes, such as levels; negative
    where choices are better than equal ones, zero where nothing is valid.

  Raises:
    ValueError: the shapes disagree.
    TypeError: `valid` is not Boolean.

  Example:
    >>> lost = jnp.array([[0.5, 0.0], [0.25, 0.0]])
    >>> float(narrowing_loss(jnp.array([[0.0, 1.0], [1.0, 0.0]]), lost))
    -0.0625
  """
  if likely.shape != lost.shape:
    raise ValueError(
      'what is lost must be one number for each candidate: '
      f'{likely.shape=} {lost.shape=}'
    )
  if valid is None:
    valid = jnp.ones(lost.shape[-2], bool)
  if valid.shape != lost.shape[-2:-1]:
    raise ValueError(
      f'valid must be one per image: {valid.shape=} {lost.shape=}'
    )
  if valid.dtype != jnp.bool_:
    raise TypeError(f'valid must be Boolean, True takes part: {valid.dtype=}')
  images = valid[:, None].reshape((1,) * (lost.ndim - 2) + (-1, 1))
  count = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1)
  lost = jnp.where(images, jax.lax.stop_gradient(lost), 0).astype(jnp.float32)
  beside = lost - jnp.sum(lost, axis=-2, keepdims=True) / count
  spent = jnp.where(images, likely.astype(jnp.float32) * beside, 0)
  return jnp.mean(jnp.sum(spent, axis=(-2, -1))) / count


def nexus_losses(
  loss: Callable[..., Array],
  *,
  ratio: float = 8.0,
  target: float = 0.2,
  mass: float = 1.0,
  width: float = 4.0,
  width_target: float = 0.75,
  narrowing: float = 30.0,
  **of_msba: Any,
) -> tuple[LossTerm, ...]:
  r"""Objective of NEXUS: that of MSBA, how much is looked at, and how well.

  L = L_MSBA + λ_r 2 (mean M − ρ*)² + λ_m mean KL(sparse‖dense)
    + λ_w 2 (mean w − w*)² + λ_n mean Σ_w p_w (D_w − mean D_w)

  Each pair spends a budget where it helps most: the images share it, and one
  that loses much by looking at little gets more of it. Levels have budgets of
  their own, and the terms are means over them. A target is best between two
  candidates: on one of them all images can meet it alike, and do.

  The terms beside those of MSBA are called 'ratio', 'mass', 'width' and
  'narrowing'; one of weight zero is left out, as the latter two have to be
  where no width is chosen. They read `kept`, `divergence` and `breadth` of
  `out['aux']['msw']`, one number for each level and image (l, n) or one for
  all, `widths` and `lost`, one for each candidate besides (l, n, k), and
  `batch['valid']`; means M and w are over the valid images.

  Args:
    loss: as in `msba_losses`.
    ratio: λ_r.
    target: ρ*, the share that is to be kept.
    mass: λ_m.
    width: λ_w.
    width_target: w*, the width that stripes are to have, over the widest.
    narrowing: λ_n.
    **of_msba: further arguments of `msba_losses`.

  Returns:
    Terms for `total_loss`.

  Raises:
    ValueError: a weight is negative, or a target is not a share; or, when the
      terms are evaluated, the model does not give what a term reads.

  Example:
    >>> from msba_jax.losses import proxy_anchor
    >>> [(t.name, t.weight) for t in nexus_losses(proxy_anchor)][3:]
    [('ratio', 8.0), ('mass', 1.0), ('width', 4.0), ('narrowing', 30.0)]
  """
  check_weight(ratio=ratio, mass=mass, width=width, narrowing=narrowing)
  for name, share in (('target', target), ('width_target', width_target)):
    if not 0 < share <= 1:
      raise ValueError(f'{name}={share} must be above 0 and at most 1')

  def budget(name: str, share: float) -> Callable[..., Array]:
    def term(out: dict[str, Any], batch: dict[str, Any]) -> Array:
      spent, valid = _told(name, out, batch)
      if spent.ndim < 2:
        return ratio_loss(spent, share, valid=valid)
      of_level = jax.vmap(lambda x, v: ratio_loss(x, share, valid=v))
      return jnp.mean(of_level(spent, valid))

    return term

  def mean_of(name: str) -> Callable[..., Array]:
    return lambda out, batch: masked_mean(*_told(name, out, batch))

  terms = (
    LossTerm('ratio', ratio, budget('kept', target)),
    LossTerm('mass', mass, mean_of('divergence')),
    LossTerm('width', width, budget('breadth', width_target)),
    LossTerm('narrowing', narrowing, _narrowing),
  )
  return (
    *msba_losses(loss, **of_msba),
    *(term for term in terms if term.weight > 0),
  )


def _narrowing(out: dict[str, Any], batch: dict[str, Any]) -> Array:
  likely, lost = (_of_windows(name, out) for name in ('widths', 'lost'))
  return narrowing_loss(likely, lost, valid=batch['valid'])


def _told(
  name: str, out: dict[str, Any], batch: dict[str, Any]
) -> tuple[Array, Array | None]:
  """What the windows told of their sparsity, and where it counts."""
  told, valid = _of_windows(name, out), batch['valid']
  if told.ndim == 0:
    return told, None
  if told.shape[-1:] != valid.shape:
    raise ValueError(
      f'{name} of the windows must end in one number per image: '
      f'{told.shape=} {valid.shape=}'
    )
  valid = valid.reshape((1,) * (told.ndim - 1) + valid.shape)
  return told, jnp.broadcast_to(valid, told.shape)


def _of_windows(name: str, out: dict[str, Any]) -> Array:
  windows = out['aux'].get('msw', {})
  if name not in windows:
    raise ValueError(
      f'the model tells no {name} of its windows: build it with sparse '
      'windows, or give this term the weight 0'
    )
  return jnp.asarray(windows[name])
