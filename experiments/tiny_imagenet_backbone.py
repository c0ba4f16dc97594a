"""Photographs, control: the backbone alone, no image ever sees another.

Trained from scratch it is also the backbone that the other two experiments take
as it is: `--frozen-backbone runs/tiny_imagenet_backbone/seed0`. Measured
results: docs/results.md.

  msba train experiments/tiny_imagenet_backbone.py --data.path photos.zip
"""

import functools

from msba_jax.losses import normalized_softmax, solo_losses
from msba_jax.models.backbones.conv import ConvNet
from msba_jax.models.controls import BackboneOnly
from msba_jax.training.experiment import Experiment
from msba_jax.training.photographs import BACKBONE, CLASSES, photographs


def experiment() -> Experiment:
  """Backbone, pooled and projected; normalised softmax over classes."""
  return photographs(
    'tiny_imagenet_backbone',
    BackboneOnly(ConvNet(BACKBONE), hidden=305, num_classes=CLASSES),
    solo_losses(functools.partial(normalized_softmax, smoothing=0.1)),
  )
