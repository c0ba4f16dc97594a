"""A tiny experiment on images that are drawn when they are asked for.

The tests load it as a user's file is loaded. `SMALL_TRAP` names an image whose
loss is not finite.
"""

import dataclasses
import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msba_jax.data.source import Evaluation, Splits
from msba_jax.data.transforms import random_crop
from msba_jax.layers.attention import attend
from msba_jax.layers.normalize import safe_normalize
from msba_jax.losses.contrastive import supervised_contrastive
from msba_jax.losses.objective import msba_losses
from msba_jax.losses.term import LossTerm
from msba_jax.models.context import BatchContext, Context, solo
from msba_jax.training.experiment import Experiment, OptimizerConfig


class Tiny(nn.Module):
  """The interface of MSBA in three dense layers, which compile fast."""

  features: int = 8

  contextual = True

  def setup(self):
    self.project = nn.Dense(self.features)
    self.mix = nn.Dense(self.features, use_bias=False)
    self.embed = nn.Dense(self.features)

  def __call__(self, images, *, context=solo, train=False):
    del train
    return self.refine(self.encode(images), context=context)

  def encode(self, images):
    blocks = nn.avg_pool(images, (4, 4), (4, 4))
    flat = blocks.reshape(len(images), -1)
    return jnp.tanh(self.project(flat))[None, :, None]

  def refine(self, regions, *, context=solo):
    own = regions[0, :, 0]
    parts = [(own, jnp.zeros(len(own), bool))]
    if isinstance(context, BatchContext):
      parts = [(own, context.valid)]
      context = context.memory
    if isinstance(context, Context):
      parts.append((context.regions[0, :, 0], context.valid))
    keys, valid = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    message = attend(own[:, None], keys[:, None], keys[:, None], mask=valid)
    alone = safe_normalize(self.embed(own))
    together = safe_normalize(self.embed(own + self.mix(message[:, 0])))
    out = {
      'solo': alone,
      'context': together,
      'regions': regions,
      'memory': jax.lax.stop_gradient(regions),
      'proxies': None,
    }
    return together, out


class Drawn:
  """Noise around one colour for each class."""

  def __init__(self, classes, images, size, seed):
    self.class_names = tuple(f'class {c}' for c in range(classes))
    self.labels = np.repeat(np.arange(classes, dtype=np.int32), images)
    self.ids = tuple(f'{seed}/{i}' for i in range(len(self.labels)))
    self._size, self._seed = size, seed

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    label = int(self.labels[index])
    colour = np.random.default_rng([self._seed, label]).uniform(50, 200, 3)
    noise = np.random.default_rng([self._seed, 1000 + index]).normal(
      0, 30, (self._size, self._size, 3)
    )
    image = np.clip(colour + noise, 0, 255).astype(np.uint8)
    return {'image': image, 'label': label}


@dataclasses.dataclass(frozen=True)
class DrawnData:
  """How many classes and images, and of what size."""

  classes: int = 6
  images: int = 8
  size: int = 16
  gallery: bool = False
  seen: bool = False

  def open(self):
    """Training, validation and test sets of different colours."""
    make = functools.partial(Drawn, self.classes, self.images, self.size)
    gallery = make(3) if self.gallery else None
    seen = Evaluation(Drawn(self.classes, 3, self.size, 0), None)
    return Splits(
      make(0),
      Evaluation(make(1), None),
      Evaluation(make(2), gallery),
      seen if self.seen else None,
    )


def trap(out, batch, *, index):
  """NaN once image `index` is in the batch, 0 before."""
  del out
  return jnp.where(jnp.any(batch['index'] == index), jnp.nan, 0.0)


def experiment():
  """The experiment."""
  losses = msba_losses(supervised_contrastive)
  if 'SMALL_TRAP' in os.environ:
    function = functools.partial(trap, index=int(os.environ['SMALL_TRAP']))
    losses = (*losses, LossTerm('trap', 1.0, function))
  return Experiment(
    name='small',
    model=Tiny(),
    losses=losses,
    data=DrawnData(),
    classes_per_batch=4,
    images_per_class=2,
    augment=functools.partial(random_crop, padding=2),
    optimizer=OptimizerConfig(warmup_steps=2, learning_rate=0.01),
    steps=6,
    memory_size=6,
    ema_decay=0.9,
    checkpoint_every=3,
    log_every=2,
  )
