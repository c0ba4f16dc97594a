r"""Photographs, CASTLE.

Wanted: ahead of MSBA, BatchFormer and the backbone alone by more than the
interval, with the heads trained on one frozen backbone:

  cd experiments
  msba compare tiny_imagenet_backbone.py tiny_imagenet_batchformer.py \
    tiny_imagenet_msba.py tiny_imagenet_castle.py --seeds 0 1 2 \
    --frozen-backbone runs/tiny_imagenet_backbone/seed0

CASTLE is narrower than MSBA, so that both have as many parameters within 2 %,
and has as many heads.
Measured results: docs/systems/castle.md.

  msba train experiments/tiny_imagenet_castle.py --data.path photos.zip
"""

import functools

from msba_jax.losses import castle_losses, normalized_softmax
from msba_jax.models.backbones.conv import ConvNet
from msba_jax.models.castle import castle
from msba_jax.training.experiment import Experiment
from msba_jax.training.photographs import BACKBONE, CLASSES, photographs


def experiment() -> Experiment:
  """CASTLE; normalised softmax over classes on both streams."""
  return photographs(
    'tiny_imagenet_castle',
    castle(
      ConvNet(BACKBONE), features=56, num_heads=4, width=72, num_classes=CLASSES
    ),
    castle_losses(functools.partial(normalized_softmax, smoothing=0.1)),
  )
