"""Cars-196, MSBA on SigLIP: first 98 classes train, last 98 test.

Weights: `google/siglip-base-patch16-224` with its configs, imported once:

  msba import-weights siglip-base/model.safetensors weights/siglip_base
  tfds build cars196 --file_format=array_record
  msba train experiments/cars_siglip.py --data.data-dir tensorflow_datasets

Published on the same split: recall@1 86.5 (Hyp-ViT, ViT-S of ImageNet-21k) and
89.2 (Hyp-DINO), both arXiv 2203.10833. Not measured here yet: the file was run
for a few steps on random weights alone.
"""

from msba_jax.data.tfds import TfdsData
from msba_jax.training.experiment import Experiment
from msba_jax.training.fine_tuning import HALF, fine_tuned


def experiment() -> Experiment:
  """88 classes train and 10 validate: the first 98, in two parts."""
  data = TfdsData(
    name='cars196',
    data_dir='tensorflow_datasets',
    class_split='first',
    validation_classes=10,
    size=224,
  )
  return fine_tuned(
    'cars_siglip', 'siglip_base', data, classes=88, colours=HALF
  )
