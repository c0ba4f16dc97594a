"""Scenes, control: the backbone alone.

No image ever sees another. `hidden` makes the parameters those of MSBA within
2 %.

  msba train experiments/scenes_backbone.py
"""

import dataclasses

from msba_jax.losses import solo_losses, supervised_contrastive
from msba_jax.models.controls import BackboneOnly
from msba_jax.training.demo_experiment import experiment as demo
from msba_jax.training.experiment import Experiment


def experiment() -> Experiment:
  """The experiment of the demo with another head and its solo loss."""
  base = demo()
  return dataclasses.replace(
    base,
    name='scenes_backbone',
    model=BackboneOnly(
      base.model.backbone, hidden=388, num_classes=base.model.num_classes
    ),
    losses=solo_losses(supervised_contrastive, classification_weight=0.5),
  )
