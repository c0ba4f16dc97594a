"""A and C of a backbone on a user's own images, before a head is trained.

A sample of the training images is looked at. Alignment is with the classes: a
linear map that was fitted on one half of the sample takes the tokens of the
other half to the targets of their classes; and, if wished, with the tokens of
other backbones, in the same way. Correspondence is that of corners of images
with the same corners after a known warp.

Attributes:
  Sample: the images, their labels, and their warps.
  draw_sample: chooses them.
  RepresentationScores: what is found.
  compile_tokens: from images to the grid of a backbone.
  representation_scores: both scores.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from msba_jax.data.errors import InputError
from msba_jax.data.prefetch import load_batch
from msba_jax.data.source import Source
from msba_jax.data.transforms import normalize_image
from msba_jax.data.warps import WarpedPair, warped_pair
from msba_jax.metrics import (
  alignment_score,
  correspondence_score,
  ridge_map,
)
from msba_jax.training.backbone import initial_backbone, without_fusers
from msba_jax.training.experiment import Experiment

__all__ = [
  'RepresentationScores',
  'Sample',
  'compile_tokens',
  'draw_sample',
  'representation_scores',
]

Tokens = Float32[np.ndarray, 'n y x d']
_BATCH = 32


class Sample(NamedTuple):
  """Images of a source.

  Attributes:
    images: for the alignment.
    labels: of these.
    pairs: for the correspondence.
  """

  images: UInt8[np.ndarray, 'n height width 3']
  labels: Int[np.ndarray, ' n']
  pairs: tuple[WarpedPair, ...]


class RepresentationScores(NamedTuple):
  """What a representation promises.

  Attributes:
    alignment: A, the mean over the references.
    correspondence: C.
    references: alignment with each of them.
  """

  alignment: float
  correspondence: float
  references: dict[str, float]


def draw_sample(
  source: Source, *, images: int, pairs: int, seed: int
) -> Sample:
  """Chooses images, as many of each class as can be, and warps some.

  Args:
    source: with pictures, not features.
    images: how many.
    pairs: how many of them are warped, the first ones.
    seed: of the choice and of the warps.

  Returns:
    The sample.

  Raises:
    InputError: the source holds no pictures, or fewer than two classes of two
      images.
  """
  rng = np.random.default_rng(seed)
  labels = np.asarray(source.labels)
  order = rng.permutation(len(labels))
  # The first of each class, then the second of each, and so on.
  turns = np.argsort(_occurrence(labels[order]), kind='stable')
  chosen = order[turns][:images]
  counts = np.bincount(labels[chosen])
  if np.sum(counts >= 2) < 2:
    raise InputError(
      f'{len(chosen)} images of {len(labels)} hold no two classes with two '
      'images each: choose more with --images, or other data'
    )
  batch = load_batch(source, chosen)
  pictures = batch['image']
  if getattr(pictures, 'dtype', None) != np.uint8:
    raise InputError('the data hold features; backbones are ranked on pictures')
  warps = tuple(
    warped_pair(picture, rng=np.random.default_rng((seed, i)))
    for i, picture in enumerate(pictures[:pairs])
  )
  return Sample(pictures, batch['label'], warps)


def compile_tokens(
  experiment: Experiment,
) -> Callable[[UInt8[np.ndarray, 'n height width 3']], Tokens]:
  """From images to the grid of the backbone with which a training begins.

  Levels are resized to the finest one, brought to one size in each image,
  and stand side by side in a token.

  Args:
    experiment: the candidate.

  Returns:
    A function of images.

  Raises:
    InputError: the backbone's weights cannot be read.
  """
  experiment = without_fusers(experiment)
  variables = initial_backbone(experiment)
  model: Any = experiment.model

  @jax.jit
  def run(images: Any) -> jax.Array:
    pixels = normalize_image(images, mean=experiment.mean, std=experiment.std)
    grids = model.backbone.apply(variables, pixels, train=False)
    grids = [grid.astype(jnp.float32) for grid in jax.tree.leaves(grids)]
    height = max(grid.shape[1] for grid in grids)
    width = max(grid.shape[2] for grid in grids)
    side_by_side = [
      jax.image.resize(
        grid
        / jnp.sqrt(jnp.mean(grid**2, axis=(1, 2, 3), keepdims=True) + 1e-12),
        (len(grid), height, width, grid.shape[-1]),
        'linear',
      )
      for grid in grids
    ]
    return jnp.concatenate(side_by_side, axis=-1)

  def tokens(images: UInt8[np.ndarray, 'n height width 3']) -> Tokens:
    found = []
    for start in range(0, len(images), _BATCH):
      batch = images[start : start + _BATCH]
      # One shape: the last batch is filled up with its last image.
      rows = np.minimum(np.arange(_BATCH), len(batch) - 1)
      found.append(np.asarray(run(batch[rows]))[: len(batch)])
    return np.concatenate(found)

  return tokens


def representation_scores(
  tokens: Callable[[UInt8[np.ndarray, 'n height width 3']], Tokens],
  sample: Sample,
  *,
  references: Mapping[str, Tokens] | None = None,
) -> RepresentationScores:
  """A and C of a representation.

  Args:
    tokens: from images to a grid.
    sample: from `draw_sample`.
    references: tokens of other backbones for the images of the sample, by
      name; the classes are a reference in any case.

  Returns:
    Both scores.
  """
  grid = tokens(sample.images)
  classes, labels = np.unique(sample.labels, return_inverse=True)
  targets = {'classes': np.eye(len(classes), dtype=np.float32)[labels]}
  goals = {'classes': targets['classes'][:, None]}
  for name, other in (references or {}).items():
    goals[name] = other.reshape(len(other), -1, other.shape[-1])
    targets[name] = goals[name].mean(axis=1)
  # Every second image of each class.
  halves = _occurrence(labels) % 2 == 1
  found = {
    name: float(
      np.concatenate(
        [
          _aligned(grid, targets[name], goals[name], fitted, ~fitted)
          for fitted in (halves, ~halves)
        ]
      ).mean()
    )
    for name in goals
  }
  return RepresentationScores(
    alignment=float(np.mean(list(found.values()))),
    correspondence=_correspondence(tokens, sample.pairs),
    references=found,
  )


def _occurrence(labels: Int[np.ndarray, ' n']) -> Int[np.ndarray, ' n']:
  """How many of its class stand before each image."""
  order = np.argsort(labels, kind='stable')
  ascending = labels[order]
  found = np.empty(len(labels), np.int64)
  found[order] = np.arange(len(labels)) - np.searchsorted(ascending, ascending)
  return found


def _aligned(
  grid: Tokens,
  targets: Float[np.ndarray, 'n e'],
  goals: Float[np.ndarray, 'n s e'],
  fitted: np.ndarray,
  asked: np.ndarray,
) -> np.ndarray:
  """Alignment of some images under a map that was fitted on others."""
  inputs = grid.reshape(len(grid), -1, grid.shape[-1])
  to = ridge_map(inputs[fitted].mean(axis=1), targets[fitted])
  # Around the mean of the reference: what all images share is no agreement.
  mapped = (to(inputs[asked]) - to.offset).astype(np.float32)
  around = (goals[asked] - to.offset).astype(np.float32)
  return np.asarray(_scores_alignment(mapped, around))


_scores_alignment = jax.jit(alignment_score)


def _correspondence(
  tokens: Callable[[UInt8[np.ndarray, 'n height width 3']], Tokens],
  pairs: tuple[WarpedPair, ...],
) -> float:
  """C: the mean over the pairs that have a visible point."""
  sources, targets, points, goals, visible = (
    np.stack(parts) for parts in zip(*pairs, strict=True)
  )
  compare = jax.jit(
    functools.partial(correspondence_score, size=sources.shape[1:3])
  )
  shares = [
    np.asarray(
      compare(
        tokens(sources[rows]),
        tokens(targets[rows]),
        points[rows],
        goals[rows],
        mask=visible[rows],
      )
    )
    for rows in np.array_split(np.arange(len(pairs)), -(-len(pairs) // _BATCH))
  ]
  return float(np.nanmean(np.concatenate(shares)))
