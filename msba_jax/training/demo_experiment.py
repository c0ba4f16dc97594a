"""The experiment of `msba demo`: MSBA on drawn scenes, minutes on two cores.

Classes of threes have the same objects and differ only in the relation between
two of them, so a model that counts colours and shapes confuses them.

Attributes:
  experiment: the experiment.
"""

import functools

from msba_jax.data.scenes.source import ScenesData
from msba_jax.losses.contrastive import supervised_contrastive
from msba_jax.losses.objective import msba_losses
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.msba import msba
from msba_jax.training.experiment import (
  EvaluationConfig,
  Experiment,
  OptimizerConfig,
)

# Few tokens: attention inside a window costs their square. Grids of 6 and 3.
_SPEC = ConvSpec((48, 96, 192), (1, 1, 1), stem_stride=4, levels=2)


def experiment() -> Experiment:
  """Builds the experiment.

  Returns:
    400 steps of 64 scenes of 48×48 pixels, of 60 classes.
  """
  data = ScenesData(
    size=48, train_scenes=3000, validation_scenes=600, test_scenes=600
  )
  return Experiment(
    name='scenes_msba',
    model=msba(ConvNet(_SPEC), num_classes=data.train_classes, features=64),
    losses=msba_losses(
      functools.partial(supervised_contrastive, temperature=0.1),
      classification_weight=0.5,
    ),
    data=data,
    classes_per_batch=16,
    images_per_class=4,
    augment=None,  # flips and colours would change the class
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=30),
    steps=400,
    memory_size=data.train_classes,
    ema_decay=0.99,
    evaluate_every=200,
    checkpoint_every=200,
    log_every=10,
    evaluation=EvaluationConfig(batch_size=128, neighbours=15),
  )
