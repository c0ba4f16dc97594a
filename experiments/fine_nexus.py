"""Scenes on a fine grid: 1,024 or 3,136 tokens an image.

One convolution makes tokens of 4 × 4 pixels; grids of 1, ½ and ¼ of them are
mixed. Variants of `fine_nexus.py`:

    1024         scenes of 128 × 128 pixels, NEXUS
    1024-dense   every token of a grid looks at every other
    3136         scenes of 224 × 224 pixels, NEXUS
    3136-dense

Wanted: inference time 40 to 50 % and memory 30 to 40 % below dense, at no less
mAP. What a block costs by itself: benchmarks/nexus.py. Measured results:
docs/systems/nexus.md.

  msba train experiments/fine_nexus.py:1024
"""

import dataclasses
import functools

from msba_jax.losses import msba_losses, nexus_losses, supervised_contrastive
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.cross_window_regions import GridAttention
from msba_jax.models.nexus import nexus
from msba_jax.training.demo_experiment import experiment as demo
from msba_jax.training.experiment import EvaluationConfig, Experiment

SIZES = {'1024': 128, '3136': 224}
TOKENS = ConvSpec((64,), (1,), stem_stride=4, levels=1)
HEADS = (1, 1, 0, 0)


def experiment(variant: str = '1024') -> Experiment:
  """300 steps of 32 scenes."""
  tokens, _, mixer = variant.partition('-')
  if tokens not in SIZES or mixer not in ('', 'dense'):
    raise LookupError(f'one of {", ".join(SIZES)}, also with -dense')
  base = demo()
  mixers = (functools.partial(GridAttention, sum(HEADS)),) if mixer else None
  losses = msba_losses if mixer else nexus_losses
  return dataclasses.replace(
    base,
    name=f'fine_nexus_{variant}',
    model=nexus(
      ConvNet(TOKENS),
      heads=HEADS,
      region=8,
      scales=(1, 2, 4),
      mixers=mixers,
      num_classes=base.model.num_classes,
    ),
    losses=losses(
      functools.partial(supervised_contrastive, temperature=0.1),
      classification_weight=0.5,
    ),
    data=dataclasses.replace(base.data, size=SIZES[tokens]),
    classes_per_batch=8,
    steps=300,
    evaluation=EvaluationConfig(batch_size=32, neighbours=15),
  )
