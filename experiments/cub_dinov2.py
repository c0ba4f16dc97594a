"""CUB-200-2011, MSBA on DINOv2: first 100 classes train, last 100 test.

Weights: `facebook/dinov2-base` with its configs, imported once:

  msba import-weights dinov2-base/model.safetensors weights/dinov2_base
  tfds build caltech_birds2011 --file_format=array_record
  msba train experiments/cub_dinov2.py --data.data-dir tensorflow_datasets

Published on the same split: recall@1 76.6 (IRT, DeiT-S, arXiv 2102.05644), 85.6
(Hyp-ViT, ViT-S of ImageNet-21k, arXiv 2203.10833). Not measured here yet: the
file was run for a few steps on random weights alone.
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

CLASSES = 90


def experiment() -> Experiment:
  """Four levels of the transformer; lower layers learn more slowly."""
  backbone = ViT(VARIANTS['dinov2_base'], levels=(3, 6, 9, 12), remat=True)
  return Experiment(
    name='cub_dinov2',
    model=msba(
      backbone,
      features=256,
      embedding=384,
      num_heads=8,
      num_classes=CLASSES,
    ),
    losses=msba_losses(proxy_anchor),
    data=TfdsData(
      name='caltech_birds2011',
      data_dir='tensorflow_datasets',
      class_split='first',
      validation_classes=10,
      size=224,
      interpolation='bicubic',
    ),
    classes_per_batch=16,
    images_per_class=4,
    augment=compose(
      functools.partial(random_resized_crop, area=(0.3, 1.0)), random_flip
    ),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    optimizer=OptimizerConfig(
      learning_rate=1e-4,
      warmup_steps=200,
      weight_decay=0.05,
      layer_decay=0.75,
    ),
    pretrained='weights/dinov2_base',
    steps=3000,
    memory_size=CLASSES,
    evaluate_every=500,
    checkpoint_every=500,
  )
