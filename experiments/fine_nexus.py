"""Scenes on a fine grid: 1,024 or 3,136 tokens an image.

One convolution makes tokens of 4 × 4 pixels; grids of 1, ½ and ¼ of them are
mixed. Variants of `fine_nexus.py` are sizes, `1024` for scenes of 128 × 128
pixels and `3136` for 224 × 224, with NEXUS, or with what it is held against:

    1024-dense    every token of a grid looks at every other
    1024-stripes  rows and columns, stripes of 2 tokens, as CSWin has them
    1024-routing  a quarter of the regions, no network, as BiFormer has them

Wanted: inference time 40 to 50 % and memory 30 to 40 % below dense, at no less
mAP. All have as many parameters within 2 %. What a block costs by itself:
benchmarks/nexus.py; what these models cost: benchmarks/nexus_inference.py.
Measured results: docs/systems/nexus.md.

  msba train experiments/fine_nexus.py:1024
"""

import dataclasses
import functools

from msba_jax.losses import msba_losses, nexus_losses, supervised_contrastive
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.nexus import nexus, published_mixers
from msba_jax.training.demo_experiment import experiment as demo
from msba_jax.training.experiment import EvaluationConfig, Experiment

SIZES = {'1024': 128, '3136': 224}
TOKENS = ConvSpec((64,), (1,), stem_stride=4, levels=1)
REGION = 8
MIXERS = published_mixers(REGION)
LOSSES = {
  '': nexus_losses,
  'routing': functools.partial(nexus_losses, width=0.0, narrowing=0.0),
}


def experiment(variant: str = '1024') -> Experiment:
  """500 steps of 32 scenes."""
  tokens, _, mixer = variant.partition('-')
  if tokens not in SIZES or mixer not in {'', *MIXERS}:
    raise LookupError(
      f'one of {", ".join(SIZES)}, also with -{", -".join(MIXERS)}'
    )
  base = demo()
  return dataclasses.replace(
    base,
    name=f'fine_nexus_{variant}',
    model=nexus(
      ConvNet(TOKENS),
      heads=(1, 1, 0, 0),
      context_heads=2,
      region=REGION,
      scales=(1, 2, 4),
      mixers=MIXERS.get(mixer),
      num_classes=base.model.num_classes,
    ),
    losses=LOSSES.get(mixer, msba_losses)(
      functools.partial(supervised_contrastive, temperature=0.1),
      classification_weight=0.5,
    ),
    data=dataclasses.replace(base.data, size=SIZES[tokens]),
    classes_per_batch=8,
    steps=500,
    evaluation=EvaluationConfig(batch_size=32, neighbours=15),
  )
