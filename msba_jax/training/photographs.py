"""What experiments on small photographs share, so that only heads differ.

Attributes:
  CLASSES: training classes that are left after the validation classes.
  BACKBONE: sizes of the backbone.
  augment: crops, flips and colours.
  photographs: an experiment with everything but its model and losses.
"""

import functools

import flax.linen as nn

from msba_jax.data.folder import FolderData
from msba_jax.data.transforms import (
  color_jitter,
  compose,
  random_flip,
  random_resized_crop,
)
from msba_jax.losses.term import LossTerm
from msba_jax.models.backbones.conv import ConvSpec
from msba_jax.training.experiment import (
  EvaluationConfig,
  Experiment,
  OptimizerConfig,
)

CLASSES = 85
BACKBONE = ConvSpec((64, 128, 256), (1, 1, 1), stem_stride=4, levels=2)

augment = compose(
  functools.partial(random_resized_crop, area=(0.4, 1.0)),
  random_flip,
  functools.partial(color_jitter, brightness=0.3, contrast=0.3),
)


def photographs(
  name: str, model: nn.Module, losses: tuple[LossTerm, ...]
) -> Experiment:
  """Photographs of 64×64 pixels: 85 classes train, 15 validate, others test.

  Args:
    name: of the experiment.
    model: with `num_classes=CLASSES`.
    losses: its objective.

  Returns:
    2,000 steps of 128 images.
  """
  return Experiment(
    name=name,
    model=model,
    losses=losses,
    data=FolderData(
      path='data/tiny_imagenet_retrieval.zip',
      size=64,
      validation_classes=15,
      cache_dir='data/decoded',
    ),
    classes_per_batch=32,
    images_per_class=4,
    augment=augment,
    mean=(0.48, 0.45, 0.40),
    std=(0.28, 0.27, 0.28),
    optimizer=OptimizerConfig(
      learning_rate=2e-3, warmup_steps=200, weight_decay=0.05
    ),
    steps=2000,
    memory_size=CLASSES,
    ema_decay=0.998,
    evaluate_every=500,
    checkpoint_every=250,
    log_every=25,
    evaluation=EvaluationConfig(batch_size=256, neighbours=20),
  )
