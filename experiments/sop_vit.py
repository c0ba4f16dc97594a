"""Stanford Online Products, MSBA on ViT: 11,318 classes train, 11,316 test.

Weights: `google/vit-base-patch16-224-in21k` with its configs, imported once:

  msba import-weights vit-base/model.safetensors weights/vit_base
  tfds build stanford_online_products --file_format=array_record
  msba train experiments/sop_vit.py --data.data-dir tensorflow_datasets

Published on the same split: recall@1 85.9 (Hyp-ViT, ViT-S of ImageNet-21k,
arXiv 2203.10833). Not measured here yet: the file was run for a few steps on
random weights alone.
"""

from msba_jax.data.tfds import TfdsData
from msba_jax.training.experiment import Experiment
from msba_jax.training.fine_tuning import HALF, fine_tuned


def experiment() -> Experiment:
  """Without a memory: one slot for each of 10,000 classes would not fit."""
  data = TfdsData(
    name='stanford_online_products',
    data_dir='tensorflow_datasets',
    label_key='class_id',
    class_split='own',
    validation_classes=1318,
    size=224,
    interpolation='bilinear',
  )
  return fine_tuned(
    'sop_vit',
    'vit_base',
    data,
    classes=10_000,
    colours=HALF,
    images_per_class=2,
    memory=False,
  )
