"""Scenes, NEXUS, and what it is held against on the same grids.

Grids of 12, 6 and 3 tokens a side. Variants of `scenes_nexus.py`:

    msba     MSBA
    dense    every token of a grid looks at every other
    stripes  rows and columns, stripes of 2 tokens, as CSWin has them
    routing  a quarter of the regions, no network, as BiFormer has them
    regions  NEXUS without stripes
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
NEXUS = '', 'regions', 'fixed'
FIXED = {'widths': (2,), 'ratios': (1 / 4,)}
ADAPTIVE = {'widths': (1, 2, 4), 'ratios': (1 / 8, 1 / 4, 1 / 2, 1.0)}
MIXERS = published_mixers(REGION)
# Without widths to choose.
ONE_WIDTH = functools.partial(nexus_losses, width=0.0, narrowing=0.0)
LOSSES = {
  '': nexus_losses,
  'fixed': ONE_WIDTH,
  'regions': ONE_WIDTH,
  'routing': ONE_WIDTH,
}


def model(variant: str, classes: int) -> nn.Module:
  """NEXUS, or a variant of it."""
  if variant == 'msba':
    return msba(ConvNet(GRIDS), num_classes=classes)
  if variant not in {*NEXUS, *MIXERS}:
    names = sorted({'msba', *NEXUS, *MIXERS} - {''})
    raise LookupError(f'one of {", ".join(names)}')
  return nexus(
    ConvNet(GRIDS),
    # As many parameters as MSBA within 2 %.
    features=58,
    # Along rows and columns, beside the two that look at regions.
    heads=(0, 0, 0, 0) if variant == 'regions' else (1, 1, 0, 0),
    context_heads=2,
    region=REGION,
    num_classes=classes,
    mixers=MIXERS.get(variant),
    **(FIXED if variant == 'fixed' else ADAPTIVE),
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
