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
from msba_jax.models.cross_window_regions import GridAttention
from msba_jax.models.cross_windows import CrossWindowAttention
from msba_jax.models.msba import msba
from msba_jax.models.nexus import nexus
from msba_jax.models.sparse_attention import SparseAttention
from msba_jax.training.demo_experiment import experiment as demo
from msba_jax.training.experiment import Experiment

GRIDS = ConvSpec((48, 96, 192), (1, 1, 1), stem_stride=4, levels=3)
HEADS, REGION = 4, 3
# The attention of the grids where it is not that of NEXUS.
MIXERS = {
  'dense': functools.partial(GridAttention, HEADS),
  'stripes': functools.partial(CrossWindowAttention, (2, 2, 0, 0), (2,)),
  'routing': functools.partial(SparseAttention, HEADS, REGION, (1 / 4,)),
}
CHOICES = {
  '': {'widths': (1, 2, 4), 'ratios': (1 / 8, 1 / 4, 1 / 2, 1.0)},
  'fixed': {'widths': (2,), 'ratios': (1 / 4,)},
}


def model(variant: str, classes: int) -> nn.Module:
  """NEXUS, or a variant of it."""
  if variant == 'msba':
    return msba(ConvNet(GRIDS), num_classes=classes)
  build = functools.partial(
    nexus,
    ConvNet(GRIDS),
    heads=(1, 1, 1, 1),
    region=REGION,
    num_classes=classes,
  )
  if variant in CHOICES:
    return build(**CHOICES[variant])
  if variant in MIXERS:
    return build(mixers=(MIXERS[variant],))
  names = sorted({'msba', *CHOICES, *MIXERS} - {''})
  raise LookupError(f'one of {", ".join(names)}')


def experiment(variant: str = '') -> Experiment:
  """The experiment of the demo on finer grids."""
  base = demo()
  objective = functools.partial(
    nexus_losses if variant in ('', 'fixed', 'routing') else msba_losses,
    functools.partial(supervised_contrastive, temperature=0.1),
    classification_weight=0.5,
  )
  return dataclasses.replace(
    base,
    name='_'.join(filter(None, ('scenes_nexus', variant))),
    model=model(variant, base.model.num_classes),
    losses=objective(),
  )
