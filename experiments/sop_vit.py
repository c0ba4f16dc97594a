"""Stanford Online Products, MSBA on ViT: 11,318 classes train, 11,316 test.

Weights: `google/vit-base-patch16-224-in21k` with its configs, imported once:

  msba import-weights vit-base/model.safetensors weights/vit_base
  tfds build stanford_online_products --file_format=array_record
  msba train experiments/sop_vit.py --data.data-dir tensorflow_datasets

Published on the same split: recall@1 85.9 (Hyp-ViT, ViT-S of ImageNet-21k,
arXiv 2203.10833). Not measured here yet: the file was run for a few steps on
random weights alone.
"""

import functools

from msba_jax.data.tfds import TfdsData
from msba_jax.data.transforms import (
  compose,
  random_flip,
  random_resized_crop,
)
from msba_jax.losses import msba_losses, proxy_anchor
from msba_jax.models.backbones.vit import VARIANTS, ViT
from msba_jax.models.msba import msba
from msba_jax.training.experiment import Experiment, OptimizerConfig

CLASSES = 10_000


def experiment() -> Experiment:
  """Without a memory: one slot for each of 10,000 classes would not fit."""
  backbone = ViT(VARIANTS['vit_base'], levels=(3, 6, 9, 12), remat=True)
  return Experiment(
    name='sop_vit',
    model=msba(
      backbone,
      features=256,
      embedding=384,
      num_heads=8,
      num_classes=CLASSES,
    ),
    losses=msba_losses(proxy_anchor),
    data=TfdsData(
      name='stanford_online_products',
      data_dir='tensorflow_datasets',
      label_key='class_id',
      class_split='own',
      validation_classes=1318,
      size=224,
      interpolation='bilinear',
    ),
    classes_per_batch=32,
    images_per_class=2,
    augment=compose(
      functools.partial(random_resized_crop, area=(0.3, 1.0)), random_flip
    ),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    optimizer=OptimizerConfig(
      learning_rate=1e-4,
      warmup_steps=200,
      weight_decay=0.05,
      layer_decay=0.75,
    ),
    pretrained='weights/vit_base',
    steps=3000,
    evaluate_every=500,
    checkpoint_every=500,
  )
