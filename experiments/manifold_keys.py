"""Small photographs: a small ViT or Swin, with plain keys or manifold keys.

The variants are `vit` and `swin`, which have plain keys, and behind a dash the
kind of manifold keys: `vit-vanilla`, `vit-simple`, `vit-unbalanced_atlas`,
`vit-spatial`, each with as many weights as plain keys, or with charts of full
width: `vit-vanilla-full`. `unbalanced_atlas-no_penalty` leaves the memberships
to the task alone. Measured results: docs/systems/manifold-keys.md.

  msba compare experiments/manifold_keys.py:vit \
    experiments/manifold_keys.py:vit-vanilla --data.path photos.zip
"""

import dataclasses
import functools
from typing import get_args

import flax.linen as nn

from msba_jax.layers.manifold import Variant
from msba_jax.losses import normalized_softmax, solo_losses
from msba_jax.models.backbones.swin import Swin, SwinSpec
from msba_jax.models.backbones.vit import ViT, ViTSpec
from msba_jax.models.blocks import KeyProjection
from msba_jax.models.controls import BackboneOnly
from msba_jax.models.manifold_keys import Budget, ManifoldKeys
from msba_jax.training.experiment import Experiment, OptimizerConfig
from msba_jax.training.photographs import CLASSES, photographs

BACKBONES = ('vit', 'swin')
VIT = ViTSpec(96, 4, 3, patch=8, image=48, class_token=False)
SWIN = SwinSpec(64, (2, 2), (2, 4), window=3, patch=8, levels=2)

KEYS: dict[str, KeyProjection] = {
  variant + ('' if budget == 'equal' else f'-{budget}'): functools.partial(
    ManifoldKeys, variant=variant, budget=budget
  )
  for variant in get_args(Variant)
  for budget in get_args(Budget)
}
KEYS['unbalanced_atlas-no_penalty'] = functools.partial(
  ManifoldKeys, variant='unbalanced_atlas', penalty=0.0
)


def experiment(variant: str) -> Experiment:
  """2,000 steps of 64 images of 48×48 pixels; 20 images a class held out."""
  base = photographs(
    f'manifold_keys_{variant}',
    BackboneOnly(_backbone(variant), hidden=256, num_classes=CLASSES),
    solo_losses(functools.partial(normalized_softmax, smoothing=0.1)),
  )
  return dataclasses.replace(
    base,
    data=dataclasses.replace(base.data, size=48, held_out_images=20),
    classes_per_batch=16,
    optimizer=OptimizerConfig(
      learning_rate=1e-3, warmup_steps=200, weight_decay=0.05
    ),
    memory_size=0,
    evaluate_every=0,
  )


def _backbone(variant: str) -> nn.Module:
  """The backbone of a variant.

  Raises:
    LookupError: there is no such variant.
  """
  name, _, keys = variant.partition('-')
  if name not in BACKBONES or (keys and keys not in KEYS):
    raise LookupError(
      f'{" or ".join(BACKBONES)}, alone or with -KEYS, one of {", ".join(KEYS)}'
    )
  if name == 'vit':
    return ViT(VIT, keys=KEYS.get(keys))
  return Swin(SWIN, keys=KEYS.get(keys))
