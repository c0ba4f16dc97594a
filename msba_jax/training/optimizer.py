"""The optimiser: AdamW behind clipping, and which parameters it moves how far.

Attributes:
  learning_rate: the rate as a function of the step.
  decay_mask: where weight decay applies.
  frozen_mask: what does not change.
  layer_scales: what the rate is multiplied by.
  scale_by_layer: the transformation that multiplies.
  make_optimizer: all of them together.
"""

import fnmatch
import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msba_jax.data.errors import InputError
from msba_jax.training.experiment import OptimizerConfig

_NO_DECAY = ('bias', 'scale')

# Paths inside the backbone, by where they stand in the order of its layers.
_BEFORE = re.compile(
  r'(?:backbone/)+(norm_)?(stem|patch|position|prefix|class_token|before)'
)
_BLOCK = re.compile(r'(?:backbone/)+(?:stage_(\d+)(?:/block)?_|block_)(\d+)/')
_SCANNED = re.compile(r'(?:backbone/)+(?:stage_(\d+)/)?blocks/')
_STAGE = re.compile(r'(?:backbone/)+(?:stage|merge|downsample)_(\d+)/')
_Place: TypeAlias = tuple[int | float, ...]
_FIRST, _LAST = (-math.inf,), (math.inf,)


def learning_rate(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
  """The learning rate as a function of the step.

  It rises linearly to the peak over the warmup, and then stays there
  (`constant`) or falls towards zero along half a cosine (`cosine`). Neither
  the first nor the last step has a rate of zero.

  Args:
    config: peak, warmup and kind of schedule.
    steps: length of the training.

  Returns:
    An Optax schedule.

  Raises:
    ValueError: the warmup does not end before the training.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  if not 0 <= warmup < steps:
    raise ValueError(
      f'optimizer.warmup_steps={warmup} must be >= 0 and less than {steps=}'
    )

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    rise = jnp.minimum((count + 1) / max(warmup, 1), 1.0)
    progress = jnp.clip((count - warmup) / (steps - warmup), 0.0, 1.0)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return peak * rise * (fall if config.schedule == 'cosine' else 1.0)

  return schedule


def decay_mask(params: Any) -> Any:
  """True where weight decay applies: kernels and tables of embeddings.

  Biases, scales of norms, and every scalar and vector are left alone.

  Args:
    params: the parameters of a model.

  Returns:
    A pytree of the same structure, of Booleans.
  """

  def decays(path, leaf):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return leaf.ndim > 1 and name not in _NO_DECAY

  return jax.tree_util.tree_map_with_path(decays, params)


def frozen_mask(params: Any, patterns: Sequence[str]) -> Any:
  """True where a parameter does not change.

  Args:
    params: the parameters of a model.
    patterns: shell patterns of paths such as `backbone/block_0/norm/scale`; an
      asterisk also matches slashes.

  Returns:
    A pytree of the same structure, of Booleans.

  Raises:
    InputError: a pattern matches no parameter, or nothing is left to train.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  names = [_name(path) for path, _ in leaves]
  frozen = np.zeros(len(names), bool)
  for pattern in patterns:
    found = [fnmatch.fnmatchcase(name, pattern) for name in names]
    if not any(found):
      raise InputError(
        f'optimizer.freeze {pattern!r} matches no parameter; the model has '
        f'{_tops(names)}: name a path below, such as {names[0]}'
      )
    frozen |= found
  if names and frozen.all():
    raise InputError(
      f'optimizer.freeze {" ".join(patterns)} leaves nothing to train; the '
      f'model has {_tops(names)}: leave out a pattern'
    )
  return jax.tree.unflatten(structure, frozen.tolist())


def layer_scales(params: Any, decay: float) -> Any:
  r"""What the rate of each parameter is multiplied by: decay^(depth - layer).

  Layers are counted in the subtree `backbone`, or in one of that name inside
  it. Layer 0 stands before the blocks: stem, patches, positions, prefix. The
  blocks follow in their order: `block_<i>`, `stage_<i>_<j>` or
  `stage_<i>/block_<j>`; each row of a leaf below `blocks` or `stage_<i>/blocks`
  is a block. What merges the grid before a stage (`merge_<i>`,
  `downsample_<i>`) and what else the stage has goes with its first block. All
  other parameters, such as norms after the blocks and heads, are of the last
  layer, `depth`: one more than there are blocks.

  Args:
    params: the parameters of a model, or their shapes.
    decay: factor between neighbouring layers; 1 is the same rate everywhere.

  Returns:
    A pytree of the same structure, of floats; where a leaf holds several
    blocks, an array (blocks, 1, …) with the rank of the leaf.

  Raises:
    InputError: the rates shall differ and the backbone has no blocks.

  Example:
    >>> leaf = jnp.zeros((2, 3))
    >>> backbone = {'stem': leaf, 'block_0': {'kernel': leaf}, 'norm': leaf}
    >>> layer_scales({'backbone': backbone}, 0.5)['backbone']
    {'block_0': {'kernel': 0.5}, 'norm': 1.0, 'stem': 0.25}

  Source: BEiT: BERT Pre-Training of Image Transformers (2021), arXiv
  2106.08254; Masked Autoencoders Are Scalable Vision Learners (2021), arXiv
  2111.06377.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  names = [_name(path) for path, _ in leaves]
  shapes = [leaf.shape for _, leaf in leaves]
  places = [_places(*pair) for pair in zip(names, shapes, strict=True)]
  layers = sorted({_FIRST, _LAST}.union(*places))
  if decay != 1 and len(layers) == 2:
    raise InputError(
      f'optimizer.layer_decay={decay} needs a backbone with blocks (block_0, '
      f'stage_0_0, …), the model has {_tops(names)}: leave it at 1'
    )
  depth = len(layers) - 1
  scale = {place: decay ** (depth - i) for i, place in enumerate(layers)}
  scales = [
    np.reshape([scale[place] for place in found], (-1, *(1 for _ in shape[1:])))
    if _SCANNED.match(name)
    else scale[found[0]]
    for name, shape, found in zip(names, shapes, places, strict=True)
  ]
  return jax.tree.unflatten(structure, scales)


def scale_by_layer(decay: float) -> optax.GradientTransformation:
  """Multiplies updates by `layer_scales`; it has no state.

  Args:
    decay: factor between neighbouring layers.

  Returns:
    An Optax transformation, to follow what computes the steps.
  """

  def init(params):
    layer_scales(params, decay)  # A backbone without blocks is found here.
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    scaled = jax.tree.map(
      lambda update, scale: update * jnp.asarray(scale, update.dtype),
      updates,
      layer_scales(updates, decay),
    )
    return scaled, state

  return optax.GradientTransformation(init, update)


def make_optimizer(
  config: OptimizerConfig, *, steps: int
) -> optax.GradientTransformation:
  """Clipping by the global norm, then AdamW with schedule and decay mask.

  What is frozen gets no update and no state, and its gradients do not count in
  the norm.

  Args:
    config: the numbers.
    steps: length of the training.

  Returns:
    An Optax transformation; its `init` raises an `InputError` if `freeze` or
    `layer_decay` does not fit the parameters.
  """
  optimizer = optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate(config, steps=steps),
      b1=config.beta1,
      b2=config.beta2,
      weight_decay=config.weight_decay,
      mask=decay_mask,
    ),
  )
  if config.freeze:
    optimizer = optax.partition(
      {'trained': optimizer, 'frozen': optax.set_to_zero()},
      lambda params: jax.tree.map(
        lambda frozen: 'frozen' if frozen else 'trained',
        frozen_mask(params, config.freeze),
      ),
    )
  if config.layer_decay != 1:
    optimizer = optax.chain(optimizer, scale_by_layer(config.layer_decay))
  return optimizer


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _tops(names: Sequence[str]) -> str:
  return ', '.join(sorted({name.split('/')[0] for name in names}))


def _places(name: str, shape: tuple[int, ...]) -> list[_Place]:
  """Keys that sort as layers do: (block,) or (stage, block) within.

  Only a leaf of stacked blocks has more than one.
  """
  if _BEFORE.match(name):
    return [_FIRST]
  if found := _BLOCK.match(name):
    return [_numbers(found)]
  if found := _SCANNED.match(name):
    return [(*_numbers(found), row) for row in range(shape[0])]
  if found := _STAGE.match(name):
    return [(*_numbers(found), 0)]
  return [_LAST]


def _numbers(found: re.Match[str]) -> tuple[int, ...]:
  return tuple(int(number) for number in found.groups() if number is not None)
