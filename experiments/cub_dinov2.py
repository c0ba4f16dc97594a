"""CUB-200-2011, MSBA on DINOv2: first 100 classes train, last 100 test.

Weights: `facebook/dinov2-base` with its configs, imported once:

  msba import-weights dinov2-base/model.safetensors weights/dinov2_base
  tfds build caltech_birds2011 --file_format=array_record
  msba train experiments/cub_dinov2.py --data.data-dir tensorflow_datasets

Published on the same split: recall@1 76.6 (IRT, DeiT-S, arXiv 2102.05644), 85.6
(Hyp-ViT, ViT-S of ImageNet-21k, arXiv 2203.10833). Not measured here yet: the
file was run for a few steps on random weights alone.
"""

from msba_jax.data.tfds import TfdsData
from msba_jax.training.experiment import Experiment
from msba_jax.training.fine_tuning import IMAGENET, fine_tuned


def experiment() -> Experiment:
  """90 classes train and 10 validate: the first hundred, in two parts."""
  data = TfdsData(
    name='caltech_birds2011',
    data_dir='tensorflow_datasets',
    class_split='first',
    validation_classes=10,
    size=224,
  )
  return fine_tuned(
    'cub_dinov2', 'dinov2_base', data, classes=90, colours=IMAGENET
  )
