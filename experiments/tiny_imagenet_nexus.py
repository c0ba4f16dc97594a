r"""Photographs, NEXUS, and what it is held against on the same grids.

Grids of 8 and 4 tokens a side. Variants of `tiny_imagenet_nexus.py`:

    dense    every token of a grid looks at every other
    stripes  rows and columns, stripes of 2 tokens, as CSWin has them
    routing  a quarter of the regions, no network, as BiFormer has them

Wanted: 2 to 4 points of mAP above MSBA, with the heads trained on one frozen
backbone:

  cd experiments
  msba compare tiny_imagenet_msba.py tiny_imagenet_nexus.py \
    tiny_imagenet_nexus.py:dense tiny_imagenet_nexus.py:stripes \
    tiny_imagenet_nexus.py:routing --seeds 0 1 2 \
    --frozen-backbone runs/tiny_imagenet_backbone/seed0

All have as many parameters as MSBA within 2 %. Measured results:
docs/systems/nexus.md.

  msba train experiments/tiny_imagenet_nexus.py --data.path photos.zip
"""

import functools

from msba_jax.losses import msba_losses, nexus_losses, normalized_softmax
from msba_jax.models.backbones.conv import ConvNet
from msba_jax.models.nexus import nexus, published_mixers
from msba_jax.training.experiment import Experiment
from msba_jax.training.photographs import BACKBONE, CLASSES, photographs

REGION = 2
MIXERS = published_mixers(REGION)
LOSSES = {
  '': nexus_losses,
  'routing': functools.partial(nexus_losses, width=0.0, narrowing=0.0),
}


def experiment(variant: str = '') -> Experiment:
  """NEXUS; normalised softmax over classes on both streams."""
  if variant not in {'', *MIXERS}:
    raise LookupError(f'one of {", ".join(MIXERS)}')
  return photographs(
    '_'.join(filter(None, ('tiny_imagenet_nexus', variant))),
    nexus(
      ConvNet(BACKBONE),
      features=60,
      heads=(1, 1, 0, 0),
      context_heads=2,
      widths=(1, 2, 4),
      region=REGION,
      num_classes=CLASSES,
      mixers=MIXERS.get(variant),
    ),
    LOSSES.get(variant, msba_losses)(
      functools.partial(normalized_softmax, smoothing=0.1)
    ),
  )
