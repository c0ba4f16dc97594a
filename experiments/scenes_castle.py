"""Scenes, CASTLE, and CASTLE without one of its parts.

Wanted: at least 3 points of mAP above MSBA, and 15 % more than it where the
background no longer tells the class:

  msba compare experiments/scenes_backbone.py \
    experiments/scenes_batchformer.py experiments/scenes_msba.py \
    experiments/scenes_castle.py --seeds 0 1 2 \
    --data.hue-correlation 0.95 --data.shifted

`scenes_castle.py:no_gate` and the other variants leave a part out. CASTLE is
narrower than MSBA, so that both have as many parameters within 2 %, and has
as many heads. Measured
results: docs/systems/castle.md.

  msba train experiments/scenes_castle.py
"""

import dataclasses
import functools
from typing import Any

from msba_jax.losses import castle_losses, supervised_contrastive
from msba_jax.models.castle import castle
from msba_jax.training.demo_experiment import experiment as demo
from msba_jax.training.experiment import Experiment

PARTS = ('gate', 'graph', 'counterfactual', 'effect', 'heads')


def experiment(variant: str = '') -> Experiment:
  """The experiment of the demo with CASTLE in the place of MSBA."""
  without = variant.removeprefix('no_')
  if variant and (without == variant or without not in PARTS):
    raise LookupError(f'one of {", ".join(f"no_{part}" for part in PARTS)}')
  parts: dict[str, Any] = {without: False} if variant else {}
  base = demo()
  weights = {
    'graph': {'acyclicity': 0.0, 'sparsity': 0.0},
    'effect': {'effect': 0.0},
  }.get(without, {})
  return dataclasses.replace(
    base,
    name='_'.join(filter(None, ('scenes_castle', variant))),
    model=castle(
      base.model.backbone,
      features=56,
      num_heads=4,
      width=72,
      num_classes=base.model.num_classes,
      **parts,
    ),
    losses=castle_losses(
      functools.partial(supervised_contrastive, temperature=0.1),
      classification_weight=0.5,
      **weights,
    ),
  )
