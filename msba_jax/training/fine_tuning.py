"""What experiments on pretrained backbones have in common.

Attributes:
  IMAGENET, HALF: mean and standard deviation of the channels.
  fine_tuned: MSBA on a pretrained ViT, all of it trained.
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

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def fine_tuned(
  name: str,
  variant: str,
  data: TfdsData,
  *,
  classes: int,
  colours: tuple[tuple[float, ...], tuple[float, ...]],
  images_per_class: int = 4,
  memory: bool = True,
) -> Experiment:
  """MSBA on a pretrained ViT; lower layers of it learn more slowly.

  Args:
    name: of the experiment.
    variant: of `backbones.vit`; the weights lie in `weights/<variant>`.
    data: the data set, with the size and filter that the weights are for.
    classes: number of training classes.
    colours: mean and standard deviation of the channels for the weights.
    images_per_class: of a batch of 64.
    memory: whether there is a slot for each class.

  Returns:
    The experiment.
  """
  backbone = ViT(VARIANTS[variant], levels=(3, 6, 9, 12), remat=True)
  mean, std = colours
  return Experiment(
    name=name,
    model=msba(
      backbone, features=256, embedding=384, num_heads=8, num_classes=classes
    ),
    losses=msba_losses(proxy_anchor),
    data=data,
    classes_per_batch=64 // images_per_class,
    images_per_class=images_per_class,
    augment=compose(
      functools.partial(random_resized_crop, area=(0.3, 1.0)), random_flip
    ),
    mean=mean,
    std=std,
    optimizer=OptimizerConfig(
      learning_rate=1e-4,
      warmup_steps=200,
      weight_decay=0.05,
      layer_decay=0.75,
    ),
    pretrained=f'weights/{variant}',
    steps=3000,
    memory_size=classes if memory else 0,
    evaluate_every=500,
    checkpoint_every=500,
  )
