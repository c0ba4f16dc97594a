"""Photographs, control: BatchFormer.

One transformer layer over the batch in training, dropped at test (arXiv
2203.01522). `hidden` makes the parameters those of MSBA within 2 %.

Measured results: docs/results.md.

  msba train experiments/tiny_imagenet_batchformer.py --data.path photos.zip
"""

import functools

from msba_jax.losses import msba_losses, normalized_softmax
from msba_jax.models.backbones.conv import ConvNet
from msba_jax.models.controls import BatchFormer
from msba_jax.training.experiment import Experiment
from msba_jax.training.photographs import BACKBONE, CLASSES, photographs


def experiment() -> Experiment:
  """The same loss on both streams, with one shared head."""
  return photographs(
    'tiny_imagenet_batchformer',
    BatchFormer(ConvNet(BACKBONE), hidden=193, num_classes=CLASSES),
    msba_losses(functools.partial(normalized_softmax, smoothing=0.1)),
  )
