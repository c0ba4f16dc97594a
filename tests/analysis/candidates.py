"""Candidates of a ranking: tiny networks on images drawn when asked for."""

import dataclasses

from msba_jax.losses import solo_losses, supervised_contrastive
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.controls import BackboneOnly
from tests.training.small_experiment import experiment as small

SPECS = {
  'narrow': ConvSpec((4, 6), (1, 1), levels=2),
  'wide': ConvSpec((8, 12), (1, 1), levels=2),
  'last': ConvSpec((4, 6), (1, 1), levels=1),
}


def experiment(variant):
  """The small experiment with a convolutional network."""
  if variant not in SPECS:
    raise LookupError(f'one of {", ".join(SPECS)}')
  return dataclasses.replace(
    small(),
    name=variant,
    model=BackboneOnly(
      ConvNet(SPECS[variant]), hidden=4, embedding=4, num_classes=6
    ),
    losses=solo_losses(supervised_contrastive),
    augment=None,
    memory_size=0,
  )
