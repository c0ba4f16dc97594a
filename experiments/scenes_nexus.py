"""Scenes, NEXUS, and what it is held against on the same grids.

Grids of 12, 6 and 3 tokens a side. Variants of `scenes_nexus.py`:

    msba     MSBA
    dense    every token of a grid looks at every other
    stripes  rows and columns, stripes of 2 tokens, as CSWin has them
    routing  a quarter of the regions, no network, as BiFormer has them
    fixed    NEXUS that chooses neither widths nor shares

Wanted: 2 to 4 points of mAP above MSBA. Measured results:
docs/systems/nexus.md.

  msba train experiments/scenes_nexus.py
  msba compare experiments/scenes_nexus.py:msba experiments/scenes_nexus.py \
    experiments/scenes_nexus.py:dense --seeds 0 1 2
"""

import dataclasses
import functools

import flax.linen as nn

from msba_jax.losses import msba_losses, nexus_losses, supervised_contrastive
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.msba import msba
from msba_jax.models.nexus import nexus, published_mixers
from msba_jax.training.demo_experiment import experiment as demo
from msba_jax.training.experiment import Experiment

GRIDS = ConvSpec((48, 96, 192), (1, 1, 1), stem_stride=4, levels=3)
REGION = 3
# Widths of regions, by which all have as many parameters as MSBA within 2 %,
# and `fixed` 3 % fewer; and heads of rows, columns and diagonals.
WIDE, NARROW = (58, (1, 1, 0, 0)), (51, (1, 1, 1, 0))
CHOICES = {
  '': {'widths': (1, 2, 4), 'ratios': (1 / 8, 1 / 4, 1 / 2, 1.0)},
  'fixed': {'widths': (2,), 'ratios': (1 / 4,)},
}
MIXERS = published_mixers(REGION)
# Without widths to choose.
ONE_WIDTH = functools.partial(nexus_losses, width=0.0, narrowing=0.0)
LOSSES = {'': nexus_losses, 'fixed': ONE_WIDTH, 'routing': ONE_WIDTH}


def model(variant: str, classes: int) -> nn.Module:
  """NEXUS, or a variant of it."""
  if variant == 'msba':
    return msba(ConvNet(GRIDS), num_classes=classes)
  if variant not in {*CHOICES, *MIXERS}:
    names = sorted({'msba', *CHOICES, *MIXERS} - {''})
    raise LookupError(f'one of {", ".join(names)}')
  features, heads = NARROW if variant in CHOICES else WIDE
  return nexus(
    ConvNet(GRIDS),
    features=features,
    heads=heads,
    region=REGION,
    num_classes=classes,
    mixers=MIXERS.get(variant),
    **CHOICES.get(variant, {}),
  )


def experiment(variant: str = '') -> Experiment:
  """The experiment of the demo on finer grids."""
  base = demo()
  objective = functools.partial(
    LOSSES.get(variant, msba_losses),
    functools.partial(supervised_contrastive, temperature=0.1),
    classification_weight=0.5,
  )
  return dataclasses.replace(
    base,
    name='_'.join(filter(None, ('scenes_nexus', variant))),
    model=model(variant, base.model.num_classes),
    losses=objective(),
  )
