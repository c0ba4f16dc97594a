r"""Photographs, NEXUS.

Wanted: 2 to 4 points of mAP above MSBA, with the heads trained on one frozen
backbone:

  cd experiments
  msba compare tiny_imagenet_backbone.py tiny_imagenet_batchformer.py \
    tiny_imagenet_msba.py tiny_imagenet_nexus.py --seeds 0 1 2 \
    --frozen-backbone runs/tiny_imagenet_backbone/seed0

Its width makes the parameters equal to those of MSBA within 2 %. Measured
results: docs/systems/nexus.md.

  msba train experiments/tiny_imagenet_nexus.py --data.path photos.zip
"""

import functools

from msba_jax.losses import nexus_losses, normalized_softmax
from msba_jax.models.backbones.conv import ConvNet
from msba_jax.models.nexus import nexus
from msba_jax.training.experiment import Experiment
from msba_jax.training.photographs import BACKBONE, CLASSES, photographs


def experiment() -> Experiment:
  """NEXUS; normalised softmax over classes on both streams."""
  return photographs(
    'tiny_imagenet_nexus',
    nexus(
      ConvNet(BACKBONE),
      features=54,
      heads=(1, 1, 1, 0),
      widths=(1, 2, 4),
      region=2,
      num_classes=CLASSES,
    ),
    nexus_losses(functools.partial(normalized_softmax, smoothing=0.1)),
  )
