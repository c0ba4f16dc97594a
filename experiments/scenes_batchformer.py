"""Scenes, control: BatchFormer.

One transformer layer over the batch in training, dropped at test (arXiv
2203.01522). `hidden` makes the parameters those of MSBA within 2 %.

  msba train experiments/scenes_batchformer.py
"""

import dataclasses

from msba_jax.models.controls import BatchFormer
from msba_jax.training.demo_experiment import experiment as demo
from msba_jax.training.experiment import Experiment


def experiment() -> Experiment:
  """The experiment of the demo with another head."""
  base = demo()
  return dataclasses.replace(
    base,
    name='scenes_batchformer',
    model=BatchFormer(
      base.model.backbone, hidden=247, num_classes=base.model.num_classes
    ),
    losses=base.losses,
  )
