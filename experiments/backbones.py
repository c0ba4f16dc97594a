"""Backbones of several kinds under one head: does AC say which is best?

Variants are DATA-BACKBONE, where the data are one of `DATA` and a backbone is
one of `BACKBONES`: widths, depths, stems, layers, and transformers with plain
keys and manifold keys. All see 48×48 pixels and have the same head, loss and
plan; they do not have as many parameters. `transfer` takes the backbones that
`msba train` has left of `scenes`, frozen, to scenes of other classes, and
`photo_transfer` those of `photographs` to a new head for the same classes.
Measured results: docs/systems/ac.md.

  msba rank-backbones photos.zip --trainings 4 \
    --candidates experiments/backbones.py:photographs-{conv,wide,vit,swin}
"""

import dataclasses
import functools

import flax.linen as nn

from msba_jax.losses import normalized_softmax, solo_losses
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.backbones.stem_vit import StemViT, StemViTSpec
from msba_jax.models.backbones.swin import Swin, SwinSpec
from msba_jax.models.backbones.vit import ViT, ViTSpec
from msba_jax.models.controls import BackboneOnly
from msba_jax.models.manifold_keys import ManifoldKeys
from msba_jax.training.demo_experiment import experiment as demo
from msba_jax.training.experiment import Experiment
from msba_jax.training.photographs import CLASSES, photographs

# On which data the frozen backbones of a transfer were trained.
TRANSFERS = {'transfer': 'scenes', 'photo_transfer': 'photographs'}
DATA = ('scenes', 'photographs', *TRANSFERS)
CONV = ConvSpec((48, 96, 192), (1, 1, 1), stem_stride=4, levels=2)
VIT = ViTSpec(96, 4, 3, patch=8, image=48, class_token=False)
SWIN = SwinSpec(64, (2, 2), (2, 4), window=3, patch=8, levels=2)
BACKBONES: dict[str, nn.Module] = {
  'conv': ConvNet(CONV),
  'narrow': ConvNet(dataclasses.replace(CONV, widths=(24, 48, 96))),
  'wide': ConvNet(dataclasses.replace(CONV, widths=(96, 192, 384))),
  'deep': ConvNet(dataclasses.replace(CONV, blocks=(2, 2, 2))),
  'shallow': ConvNet(ConvSpec((96, 192), (1, 1), stem_stride=4, levels=2)),
  'fine_stem': ConvNet(
    ConvSpec((24, 48, 96, 192), (1, 1, 1, 1), stem_stride=2, levels=2)
  ),
  'last_layer': ConvNet(dataclasses.replace(CONV, levels=1)),
  'all_layers': ConvNet(dataclasses.replace(CONV, levels=3)),
  'stem_vit': StemViT(StemViTSpec(64, 4, 4)),
  'vit': ViT(VIT),
  'vit_half': ViT(VIT, levels=(2,)),
  'vit_manifold': ViT(
    VIT, keys=functools.partial(ManifoldKeys, variant='vanilla')
  ),
  'swin': Swin(SWIN),
}


def experiment(variant: str) -> Experiment:
  """400 steps of 64 scenes, or 600 of 64 photographs.

  Raises:
    LookupError: there is no such variant.
  """
  data, _, name = variant.partition('-')
  if data not in DATA or name not in BACKBONES:
    raise LookupError(f'{", ".join(DATA)}; {", ".join(BACKBONES)}')
  source = TRANSFERS.get(data, data)
  scenes = demo()
  classes = CLASSES if source == 'photographs' else scenes.data.train_classes
  model = BackboneOnly(BACKBONES[name], hidden=256, num_classes=classes)
  losses = solo_losses(functools.partial(normalized_softmax, smoothing=0.1))
  if source == 'scenes':
    other_classes = dataclasses.replace(scenes.data, seed=1)
    base = dataclasses.replace(
      scenes,
      model=model,
      losses=losses,
      data=other_classes if data == 'transfer' else scenes.data,
    )
  else:
    base = photographs('', model, losses)
    base = dataclasses.replace(
      base,
      data=dataclasses.replace(base.data, size=48),
      classes_per_batch=16,
      steps=600,
      optimizer=dataclasses.replace(base.optimizer, warmup_steps=60),
      ema_decay=0.99,
    )
  if data in TRANSFERS:
    base = dataclasses.replace(
      base,
      frozen_backbone=f'runs/backbones_{source}-{name}/seed0',
      frozen_views=1,
    )
  return dataclasses.replace(
    base,
    name=f'backbones_{variant}',
    memory_size=0,
    evaluate_every=0,
  )
