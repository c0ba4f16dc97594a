"""The optimiser: AdamW behind clipping, with a schedule and a decay mask."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from msba_jax.training.experiment import OptimizerConfig

_NO_DECAY = ('bias', 'scale')


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


def make_optimizer(
  config: OptimizerConfig, *, steps: int
) -> optax.GradientTransformation:
  """Clipping by the global norm, then AdamW with schedule and decay mask.

  Args:
    config: the numbers.
    steps: length of the training.

  Returns:
    An Optax transformation.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate(config, steps=steps),
      b1=config.beta1,
      b2=config.beta2,
      weight_decay=config.weight_decay,
      mask=decay_mask,
    ),
  )
