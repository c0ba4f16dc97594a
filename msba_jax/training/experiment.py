"""What an experiment is.

Attributes:
  Metric: what an evaluation gives for each query.
  OptimizerConfig: rate, schedule, decay, clipping and what is frozen.
  ContextDropout: how often a step hides its context.
  EvaluationConfig: how a model is measured.
  Origin: where an experiment was loaded from.
  Experiment: all of it.
"""

import dataclasses
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import flax.linen as nn
import tyro

from msba_jax.data.transforms import Augment
from msba_jax.losses.term import LossTerm

Metric: TypeAlias = Literal[
  'recall@1',
  'recall@2',
  'recall@4',
  'recall@8',
  'precision@1',
  'r_precision',
  'map@r',
  'ap',
  'ap_trapezoidal',
]
_T = TypeVar('_T')
_Internal = Annotated[_T, tyro.conf.Fixed, tyro.conf.Suppress]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with warmup, a schedule and clipping.

  Attributes:
    learning_rate: the peak, reached after `warmup_steps`.
    warmup_steps: length of the linear rise from zero.
    schedule: what follows the warmup: `cosine` falls to zero at the last step.
    weight_decay: of kernels and embeddings, not of biases, norms and scalars.
    clip_norm: largest global norm of the gradient.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    layer_decay: the rate of each layer of the backbone over that of the next,
      in (0, 1]; 1 for the same everywhere. See `optimizer.layer_scales`.
    freeze: shell patterns of parameters that do not change, such as
      `backbone/*` or `backbone/block_[0-5]/*`; an asterisk also matches
      slashes.
  """

  learning_rate: float = 1e-3
  warmup_steps: int = 100
  schedule: Literal['cosine', 'constant'] = 'cosine'
  weight_decay: float = 1e-4
  clip_norm: float = 1.0
  beta1: float = 0.9
  beta2: float = 0.999
  layer_decay: float = 1.0
  freeze: tuple[str, ...] = ()

  def __post_init__(self):
    if not 0 < self.layer_decay <= 1:
      raise ValueError(
        f'optimizer.layer_decay={self.layer_decay} must be in (0, 1]'
      )


@dataclasses.dataclass(frozen=True)
class ContextDropout:
  """How often a training step hides its context.

  Attributes:
    solo: probability that the images see nothing but themselves.
    memory: probability that they see the memory instead of the batch.
  """

  solo: float = 0.2
  memory: float = 0.3

  def __post_init__(self):
    solo, memory = self.solo, self.memory
    if min(solo, memory) < 0 or solo + memory > 1:
      raise ValueError(f'{solo=} and {memory=} must be >= 0 and sum to <= 1')


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """How a model is measured.

  Attributes:
    batch_size: images per step of embedding.
    neighbours: gallery images in the context of the mode `neighbours`.
    metric: what the best checkpoint is best at.
  """

  batch_size: int = 256
  neighbours: int = 20
  metric: Metric = 'map@r'


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where an experiment was loaded from.

  Attributes:
    source: an experiment file or the name of a module.
    overrides: the command line's changes to it.
  """

  source: str
  overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that decides the numbers of a run, and how it is watched.

  Attributes:
    name: of the runs.
    model: returns `(embeddings, out)`.
    losses: terms of the sum that is minimised.
    data: a configuration whose `open()` returns the splits.
    classes_per_batch: classes in a batch.
    images_per_class: images of each of them.
    augment: changes one image; None leaves images as they are.
    mean: of the channels, for images in [0, 1]. Only uint8 images are
      normalised; cached features reach the model untouched.
    std: likewise.
    optimizer: see `OptimizerConfig`.
    steps: length of the training.
    seed: decides initialisation, batches, augmentation and contexts.
    memory_size: slots of the memory, one for each of the first training
      classes; 0 for none: the batch is seen where the memory would have been.
    context_dropout: see `ContextDropout`.
    ema_decay: of the moving average of the parameters; 0 for none.
    evaluate_every: steps between evaluations on the validation split; 0 for
      none.
    checkpoint_every: steps between checkpoints.
    log_every: steps between lines of the log.
    evaluation: see `EvaluationConfig`.
    pretrained: a directory that `msba import-weights` made, with which the
      backbone begins; '' begins at random.
    frozen_backbone: a finished run, or a directory of imported weights, whose
      backbone is taken as it is; what follows it is trained on its grids, which
      are computed once. '' trains the backbone as well.
    frozen_views: how many views of each training image have their grids
      computed: the first is plain, the others are augmented.
    origin: set by `load.load_experiment`.
  """

  name: str
  model: _Internal[nn.Module]
  losses: _Internal[tuple[LossTerm, ...]]
  data: Any
  classes_per_batch: int = 16
  images_per_class: int = 4
  augment: _Internal[Augment | None] = None
  mean: _Internal[tuple[float, ...]] = (0.5, 0.5, 0.5)
  std: _Internal[tuple[float, ...]] = (0.25, 0.25, 0.25)
  optimizer: OptimizerConfig = OptimizerConfig()
  steps: int = 1000
  seed: int = 0
  memory_size: int = 0
  context_dropout: ContextDropout = ContextDropout()
  ema_decay: float = 0.999
  evaluate_every: int = 0
  checkpoint_every: int = 500
  log_every: int = 50
  evaluation: EvaluationConfig = EvaluationConfig()
  pretrained: str = ''
  frozen_backbone: str = ''
  frozen_views: int = 4
  origin: _Internal[Origin | None] = None

  def __post_init__(self):
    for field in (
      'classes_per_batch',
      'images_per_class',
      'steps',
      'checkpoint_every',
      'log_every',
      'frozen_views',
    ):
      if getattr(self, field) < 1:
        raise ValueError(f'{field}={getattr(self, field)} must be at least 1')
    for field in ('seed', 'memory_size', 'evaluate_every'):
      if getattr(self, field) < 0:
        raise ValueError(f'{field}={getattr(self, field)} must not be negative')
    warmup, steps = self.optimizer.warmup_steps, self.steps
    if not 0 <= warmup < steps:
      raise ValueError(
        f'optimizer.warmup_steps={warmup} must be >= 0 and less than {steps=}'
      )
    if self.pretrained and self.frozen_backbone:
      raise ValueError(
        'pretrained and frozen_backbone exclude each other; frozen_backbone '
        'takes imported weights too'
      )
    if not 0 <= self.ema_decay < 1:
      raise ValueError(f'ema_decay={self.ema_decay} must be in [0, 1)')

  @property
  def batch_size(self) -> int:
    """Images of a global batch."""
    return self.classes_per_batch * self.images_per_class
