"""CUB-200-2011, MSBA on a small ViT: first 100 classes train, last 100 test.

The data set is read as TFDS prepares it, without TensorFlow at run time. Where
TensorFlow is installed, once:

  tfds build caltech_birds2011 --file_format=array_record

Published with pretrained backbones: recall@1 70.3 (Intra-batch, ResNet-50,
arXiv 2102.07753), 76.6 (IRT, DeiT-S, arXiv 2102.05644). This file trains from
scratch, which reaches far less; `cub_dinov2.py` begins with a pretrained one.

  msba train experiments/cub_msba.py --data.data-dir tensorflow_datasets
"""

import functools

from msba_jax.data.tfds import TfdsData
from msba_jax.data.transforms import (
  compose,
  random_flip,
  random_resized_crop,
)
from msba_jax.losses import msba_losses, proxy_anchor
from msba_jax.models.backbones.stem_vit import VARIANTS, StemViT
from msba_jax.models.msba import msba
from msba_jax.training.experiment import Experiment, OptimizerConfig

CLASSES = 90


def experiment() -> Experiment:
  """90 classes train and 10 validate: the first hundred, in two parts."""
  return Experiment(
    name='cub_msba',
    model=msba(StemViT(VARIANTS['small']), num_heads=4, num_classes=CLASSES),
    losses=msba_losses(proxy_anchor),
    data=TfdsData(
      name='caltech_birds2011',
      data_dir='tensorflow_datasets',
      class_split='first',
      validation_classes=10,
      size=224,
    ),
    classes_per_batch=16,
    images_per_class=4,
    augment=compose(
      functools.partial(random_resized_crop, area=(0.3, 1.0)), random_flip
    ),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    optimizer=OptimizerConfig(
      learning_rate=3e-4, warmup_steps=500, weight_decay=0.05
    ),
    steps=20_000,
    memory_size=CLASSES,
    evaluate_every=2000,
    checkpoint_every=1000,
  )
