r"""Contrastive losses of a batch that lies on many devices, a chunk at a time.

The losses of `msba_jax.losses.contrastive` without an array of all pairs. Every
device keeps its own images as anchors, and the shards go round a ring of
devices, so that each device meets every shard. Scores exist for one chunk of
anchors and one shard; of a row only its running log-sum-exp is kept.

The gradient is our own. It computes the scores again while the shards go round
a second time, with the log-normalisers of their rows and the weights of their
losses. Scores are symmetric, so a device adds for its images both what they
gain as anchors and in the rows of the anchors that pass: no gradient has to
travel, and two products of matrices suffice instead of three.

Attributes:
  PositiveSums: what `ring_nt_xent` gives.
  ring_nt_xent: every positive pair against the negatives of its anchor.
  ring_supervised_contrastive: all positives of an anchor against all others.

Source: Breaking the Memory Barrier: Near Infinite Batch Size Scaling for
Contrastive Loss (2024), arXiv 2410.17243.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msba_jax.layers.varying import varying_alike
from msba_jax.losses.similarity import (
  Scalar,
  check_labels,
  check_positive,
  unit_vectors,
)

__all__ = ['PositiveSums', 'ring_nt_xent', 'ring_supervised_contrastive']

_product = functools.partial(jnp.einsum, precision='highest')


class PositiveSums(NamedTuple):
  """Losses of the positive pairs of every local anchor, and their number.

  Attributes:
    losses: (n,) sum of the losses over the positives of an anchor.
    positives: (n,) how many there are, without a gradient; as floats, whose sum
      over a large batch does not overflow.
  """

  losses: Array
  positives: Array


def ring_supervised_contrastive(
  embeddings: Float[Array, 'n e'],
  labels: Int[Array, ' n'],
  *,
  axis_name: str | None,
  temperature: Scalar = 0.1,
  valid: Bool[Array, ' n'] | None = None,
  chunk: int = 256,
) -> Float[Array, ' n']:
  r"""Supervised contrastive loss of every local anchor among all devices.

  ℓ_i = −1/|P(i)| Σ_{p ∈ P(i)} [s_ip/τ − log Σ_{a ≠ i} exp(s_ia/τ)] as in
  `supervised_contrastive`, where a and p run over the images of all devices and
  i over those of this one. To be called inside `jax.shard_map` or `jax.pmap`;
  every device has the same number of images.

  Args:
    embeddings: of this device, of any length; they are normalised here.
    labels: class of every image of this device.
    axis_name: axis over which the batch is sharded. None: one device has all.
    temperature: τ.
    valid: False for padding, which is neither anchor nor compared with.
    chunk: largest number of anchors whose scores stand in memory at once.

  Returns:
    One loss per local image, float32 at least: this shard of the losses of the
    whole batch. Their gradient by the embeddings of a device is that of the
    losses of all devices, as it is after `jax.lax.all_gather`.

  Raises:
    ValueError: shapes disagree, or the temperature or chunk is not positive.
    TypeError: the labels are not integers, or `valid` is not Boolean.

  Example:
    >>> embeddings = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> losses = ring_supervised_contrastive(
    ...   embeddings, jnp.array([0, 0, 1]), axis_name=None, temperature=1.0
    ... )
    >>> [round(x, 4) for x in losses.tolist()]
    [0.3133, 0.3133, 0.0]

  Source: Supervised Contrastive Learning (2020), arXiv 2004.11362, equation 2.
  """
  ring = _Ring(axis_name, chunk)
  return _ring_losses(
    _SUPERVISED, ring, embeddings, labels, temperature, valid
  ).losses


def ring_nt_xent(
  embeddings: Float[Array, 'n e'],
  labels: Int[Array, ' n'],
  *,
  axis_name: str | None,
  temperature: Scalar = 0.1,
  valid: Bool[Array, ' n'] | None = None,
  chunk: int = 256,
) -> PositiveSums:
  r"""NT-Xent of every local anchor among all devices, summed over positives.

  ℓ_i = Σ_{p ∈ P(i)} log(1 + Σ_{a ∈ N(i)} exp((s_ia − s_ip)/τ)), the sum of row
  i of `nt_xent`, where a and p run over the images of all devices and i over
  those of this one. The shards go round twice: first for the normalisers, then
  for the positives. Otherwise all is as in `ring_supervised_contrastive`.

  Args:
    embeddings: as in `ring_supervised_contrastive`.
    labels: class of every image; the same for two views of one image.
    axis_name: axis over which the batch is sharded, or None.
    temperature: τ.
    valid: False for padding, which is neither anchor nor compared with.
    chunk: largest number of anchors whose scores stand in memory at once.

  Returns:
    Sum and number of the pairs of every local anchor, float32 at least. The
    published reduction, `mean_over_positive_pairs`, is `psum(losses.sum()) /
    maximum(psum(positives.sum()), 1)` over the axis.

  Raises:
    ValueError: shapes disagree, or the temperature or chunk is not positive.
    TypeError: the labels are not integers, or `valid` is not Boolean.

  Example:
    >>> embeddings = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> losses, positives = ring_nt_xent(
    ...   embeddings, jnp.array([0, 0, 1]), axis_name=None, temperature=1.0
    ... )
    >>> [round(x, 4) for x in losses.tolist()], positives.tolist()
    ([0.6931, 1.3133, 0.0], [1.0, 1.0, 0.0])

  Source: A Simple Framework for Contrastive Learning of Visual Representations
  (2020), arXiv 2002.05709.
  """
  ring = _Ring(axis_name, chunk)
  return _ring_losses(_PAIRED, ring, embeddings, labels, temperature, valid)


class _Ring(NamedTuple):
  """The axis of the devices, and the largest number of anchors of a chunk."""

  axis_name: str | None
  chunk: int


class _Images(NamedTuple):
  """A shard, or a chunk of anchors; the last three only once they are known.

  Attributes:
    vectors: unit vectors divided by the root of the temperature.
    labels: class of every image.
    valid: False for padding.
    normalizer: log-normaliser of its row.
    push: weight of that in the loss.
    pull: weight of each positive in the loss.
  """

  vectors: Array
  labels: Array
  valid: Array
  normalizer: Array | None = None
  push: Array | None = None
  pull: Array | None = None


class _Meeting(NamedTuple):
  """A chunk of anchors and a shard, their scores, and which pairs are which."""

  anchors: _Images
  shard: _Images
  scores: Array
  positive: Array
  negative: Array


class _Loss(NamedTuple):
  """What tells one loss from the other.

  Attributes:
    meet: `(ring, images)` to its result and the images with all they have.
    step: ∂ℓ/∂score of a positive, from p = exp(score − normaliser), push and
      pull; of a negative it is push · p.
  """

  meet: Callable[[_Ring, _Images], tuple[PositiveSums, _Images]]
  step: Callable[[Array, Array, Array], Array]


def _meet_supervised(ring, images):
  def visit(kept, meeting):
    normalizer, attraction, positives = kept
    scores, positive = meeting.scores, meeting.positive
    return (
      _add_exponentials(normalizer, scores, positive | meeting.negative),
      attraction + jnp.sum(jnp.where(positive, scores, 0), axis=-1),
      positives + jnp.sum(positive, axis=-1, dtype=scores.dtype),
    )

  zeros = jnp.zeros_like(images.vectors[:, 0])
  kept = _meet_all(ring, visit, (zeros - jnp.inf, zeros, zeros), images)
  normalizer, attraction, positives = kept
  push = (positives > 0).astype(zeros.dtype)
  pull = push / jnp.maximum(positives, 1)
  losses = jnp.where(positives > 0, normalizer - attraction * pull, 0)
  images = images._replace(normalizer=normalizer, push=push, pull=pull)
  return PositiveSums(losses, positives), images


def _meet_paired(ring, images):
  def normalize(normalizer, meeting):
    return _add_exponentials(normalizer, meeting.scores, meeting.negative)

  def compare(kept, meeting):
    losses, slopes, positives = kept
    positive, scores = meeting.positive, meeting.scores
    # Softplus and its slope; without a negative the gap is −∞ and both zero.
    gap = meeting.anchors.normalizer[:, None] - scores
    small = jnp.exp(-jnp.abs(gap))
    loss = jnp.maximum(gap, 0) + jnp.log1p(small)
    slope = jnp.where(gap > 0, 1, small) / (1 + small)
    return (
      losses + jnp.sum(jnp.where(positive, loss, 0), axis=-1),
      slopes + jnp.sum(jnp.where(positive, slope, 0), axis=-1),
      positives + jnp.sum(positive, axis=-1, dtype=scores.dtype),
    )

  zeros = jnp.zeros_like(images.vectors[:, 0])
  normalizer = _meet_all(ring, normalize, zeros - jnp.inf, images)
  images = images._replace(normalizer=normalizer)
  losses, slopes, positives = _meet_all(ring, compare, (zeros,) * 3, images)
  images = images._replace(push=slopes, pull=jnp.ones_like(zeros))
  return PositiveSums(losses, positives), images


# Here positives stand in the normaliser as well.
_SUPERVISED = _Loss(_meet_supervised, lambda p, push, pull: push * p - pull)
_PAIRED = _Loss(_meet_paired, lambda p, push, pull: -pull / (1 + p))


def _ring_losses(
  loss: _Loss, ring: _Ring, embeddings, labels, temperature, valid
) -> PositiveSums:
  check_labels(embeddings, labels)
  check_positive(temperature=temperature, chunk=ring.chunk)
  units = unit_vectors(embeddings, valid=valid)
  # With its root on both sides of a product, the temperature has its gradient
  # through the vectors.
  vectors = units / jnp.sqrt(jnp.asarray(temperature, units.dtype))
  valid = jnp.ones(labels.shape, bool) if valid is None else valid
  # What goes round must vary over the ring, even if no argument does.
  place = None if ring.axis_name is None else jax.lax.axis_index(ring.axis_name)
  *images, _ = varying_alike(vectors, labels, valid, place)
  return _losses(loss, ring, *images)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(loss: _Loss, ring: _Ring, vectors, labels, valid) -> PositiveSums:
  return _forward(loss, ring, vectors, labels, valid)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(loss, ring, vectors, labels, valid):
  return loss.meet(ring, _Images(vectors, labels, valid))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(loss, ring, images, cotangent):
  def visit(gradient, meeting):
    def steps(normalizer, push, pull):
      p = jnp.exp(meeting.scores - normalizer)
      return jnp.where(meeting.positive, loss.step(p, push, pull), push * p)

    as_anchors = steps(*(x[:, None] for x in meeting.anchors[3:]))
    in_other_rows = steps(*(x[None, :] for x in meeting.shard[3:]))
    pair = meeting.positive | meeting.negative
    both = jnp.where(pair, as_anchors + in_other_rows, 0)
    return gradient + _product('nm,me->ne', both, meeting.shard.vectors)

  change, start = cotangent.losses, jnp.zeros_like(images.vectors)
  images = images._replace(push=images.push * change, pull=images.pull * change)
  return _meet_all(ring, visit, start, images), None, None


_losses.defvjp(_forward, _backward)


def _meet_all(ring, visit: Callable[[Any, _Meeting], Any], kept, images):
  """What anchors keep after `kept = visit(kept, meeting)` with every shard."""
  n = len(images.labels)
  chunks = max(1, -(-n // ring.chunk))
  numbers = jnp.arange(n)
  rows = _cut((images, numbers), chunks)

  def meet(kept, shard, own):
    def chunk(arrays):
      (anchors, places), kept = arrays
      scores = _product('ne,me->nm', anchors.vectors, shard.vectors)
      same = anchors.labels[:, None] == shard.labels[None, :]
      image_itself = own & (places[:, None] == numbers[None, :])
      pair = anchors.valid[:, None] & shard.valid[None, :] & ~image_itself
      meeting = _Meeting(anchors, shard, scores, pair & same, pair & ~same)
      return visit(kept, meeting)

    return jax.lax.map(chunk, (rows, kept))

  def step(k, state):
    kept, shard = state
    # Sent before it is used, so that the next shard arrives meanwhile.
    arriving = jax.lax.ppermute(shard, ring.axis_name, onward)
    return meet(kept, shard, k == 0), arriving

  kept = _cut(kept, chunks)
  if ring.axis_name is None:
    kept = meet(kept, images, True)
  else:
    size = jax.lax.axis_size(ring.axis_name)
    onward = [(i, (i + 1) % size) for i in range(size)]
    kept, _ = jax.lax.fori_loop(0, size, step, (kept, images))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], kept)


def _cut(arrays, chunks: int):
  """Arrays in chunks of equal size; what fills the last one is not valid."""

  def cut(array):
    widths = [(0, -len(array) % chunks)] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, widths).reshape(chunks, -1, *array.shape[1:])

  return jax.tree.map(cut, arrays)


def _add_exponentials(normalizer, scores, mask):
  """Log-normaliser of every row with more scores, −∞ while there are none."""
  more = jax.nn.logsumexp(jnp.where(mask, scores, -jnp.inf), axis=-1)
  return jnp.logaddexp(normalizer, more)
