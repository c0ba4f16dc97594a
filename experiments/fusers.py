"""Layers of a frozen ViT, fused in several ways: does fine detail come back?

Variants are TASK-FUSER, where a task is one of

    photographs  classes of small photographs
    scenes       classes of drawn scenes: what their objects are, how they stand
    smallest     scenes by shape and texture of their smallest object
    largest      scenes by shape and texture of their largest object

and a fuser one of `FUSERS`; the factors of `mmfuser_open` begin at one and not
at zero; `last` takes the last layer alone. All heads have as many parameters as
that of `pyramid`, within 1 %. The backbones are trained first, on classes:
`photographs` and `scenes` alone are these variants. Measured results:
docs/systems/mmfuser.md.

  msba train experiments/fusers.py:scenes
  msba compare experiments/fusers.py:smallest-last \
    experiments/fusers.py:smallest-mmfuser \
    --frozen-backbone runs/fusers_scenes/seed0
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn

from msba_jax.data.folder import FolderData
from msba_jax.data.scenes.details import CLASSES as DETAILS
from msba_jax.data.scenes.details import DetailData
from msba_jax.data.scenes.source import ScenesData
from msba_jax.losses import normalized_softmax, solo_losses
from msba_jax.models.backbones.vit import ViT, ViTSpec
from msba_jax.models.controls import BackboneOnly
from msba_jax.models.fusion_baselines import (
  AverageFuser,
  ConcatFuser,
  PyramidFuser,
  SumFuser,
  WeightedFuser,
)
from msba_jax.models.mmfuser import FusedBackbone, MMFuser
from msba_jax.training.experiment import Experiment, OptimizerConfig
from msba_jax.training.photographs import CLASSES, photographs

# A fuser, and the width of the head that makes the parameters equal.
FUSERS: dict[str, tuple[nn.Module | None, int]] = {
  'last': (None, 1003),
  'concat': (ConcatFuser(), 774),
  'average': (AverageFuser(), 1003),
  'weighted': (WeightedFuser(), 1003),
  'pyramid': (PyramidFuser(), 256),
  'sum': (SumFuser(), 1003),
  'mmfuser': (MMFuser(num_heads=6, num_points=4), 594),
  'mmfuser_open': (MMFuser(num_heads=6, num_points=4, scale=1.0), 594),
  'mmfuser_cross': (MMFuser(6, 4, self_attention=False), 754),
  'mmfuser_softmax': (MMFuser(6, attention='softmax'), 536),
}
TASKS = ('photographs', 'scenes', 'smallest', 'largest')
SCENES: dict[str, Any] = {
  'size': 48,
  'train_scenes': 12000,
  'validation_scenes': 4000,
  'test_scenes': 4000,
  'most_objects': 4,
}
_TRAINED_DETAILS = len(DETAILS) // 2


def experiment(variant: str) -> Experiment:
  """600 steps of 64 images for a head, 2,000 for a backbone."""
  task, _, name = variant.partition('-')
  if task not in TASKS or (name and name not in FUSERS):
    raise LookupError(
      f'one of {", ".join(TASKS)}, with -FUSER, one of {", ".join(FUSERS)}'
    )
  fuser, hidden = FUSERS.get(name, (None, 256))
  patch = 8 if task == 'photographs' else 6
  vit = ViT(
    ViTSpec(96, 4, 3, patch=patch, image=48, class_token=False),
    levels=(-1,) if fuser is None else (1, 2, 3, 4),
  )
  classes = {'photographs': CLASSES, 'scenes': ScenesData.train_classes}.get(
    task, _TRAINED_DETAILS
  )
  base = photographs(
    f'fusers_{variant}',
    BackboneOnly(
      vit if fuser is None else FusedBackbone(vit, fuser),
      hidden=hidden,
      num_classes=classes,
    ),
    solo_losses(functools.partial(normalized_softmax, smoothing=0.1)),
  )
  return dataclasses.replace(
    base,
    data=_data(task, base.data),
    # Flips and colours would change the class of a scene.
    augment=base.augment if task == 'photographs' else None,
    frozen_views=4 if task == 'photographs' else 1,
    classes_per_batch=16,
    optimizer=OptimizerConfig(
      learning_rate=1e-3, warmup_steps=60, weight_decay=0.05
    ),
    steps=600 if name else 2000,
    memory_size=0,
    ema_decay=0.99 if name else 0.998,
    evaluate_every=0,
  )


def _data(task: str, folder: FolderData) -> FolderData | ScenesData:
  if task == 'photographs':
    return dataclasses.replace(folder, size=48)
  if task == 'scenes':
    return ScenesData(**SCENES)
  return DetailData(
    detail='smallest' if task == 'smallest' else 'largest', **SCENES
  )
