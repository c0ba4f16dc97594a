"""Cars-196, MSBA on SigLIP: first 98 classes train, last 98 test.

Weights: `google/siglip-base-patch16-224` with its configs, imported once:

  msba import-weights siglip-base/model.safetensors weights/siglip_base
  tfds build cars196 --file_format=array_record
  msba train experiments/cars_siglip.py --data.data-dir tensorflow_datasets

Published on the same split: recall@1 86.5 (Hyp-ViT, ViT-S of ImageNet-21k) and
89.2 (Hyp-DINO), both arXiv 2203.10833. Not measured here yet: the file was run
for a few steps on random weights alone.
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

CLASSES = 88


def experiment() -> Experiment:
  """Four levels of the transformer; lower layers learn more slowly."""
  backbone = ViT(VARIANTS['siglip_base'], levels=(3, 6, 9, 12), remat=True)
  return Experiment(
    name='cars_siglip',
    model=msba(
      backbone,
      features=256,
      embedding=384,
      num_heads=8,
      num_classes=CLASSES,
    ),
    losses=msba_losses(proxy_anchor),
    data=TfdsData(
      name='cars196',
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
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    optimizer=OptimizerConfig(
      learning_rate=1e-4,
      warmup_steps=200,
      weight_decay=0.05,
      layer_decay=0.75,
    ),
    pretrained='weights/siglip_base',
    steps=3000,
    memory_size=CLASSES,
    evaluate_every=500,
    checkpoint_every=500,
  )
