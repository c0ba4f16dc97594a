r"""Photographs, MSBA.

Wanted: solo ahead of the backbone alone, neighbours ahead of solo, by more than
the interval. Heads are compared on one backbone, trained once:

  cd experiments
  msba compare tiny_imagenet_backbone.py tiny_imagenet_batchformer.py \
    tiny_imagenet_msba.py --frozen-backbone runs/tiny_imagenet_backbone/seed0

Measured results: docs/results.md.

  msba train experiments/tiny_imagenet_msba.py --data.path photos.zip
"""

import functools

from msba_jax.losses import msba_losses, normalized_softmax
from msba_jax.models.backbones.conv import ConvNet
from msba_jax.models.msba import msba
from msba_jax.training.experiment import Experiment
from msba_jax.training.photographs import BACKBONE, CLASSES, photographs


def experiment() -> Experiment:
  """MSBA with its defaults; normalised softmax over classes on both streams."""
  return photographs(
    'tiny_imagenet_msba',
    msba(ConvNet(BACKBONE), num_classes=CLASSES),
    msba_losses(functools.partial(normalized_softmax, smoothing=0.1)),
  )
