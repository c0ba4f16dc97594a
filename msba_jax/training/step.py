"""One training step: a pure function of the state and a batch.

The step augments and normalises on the device, draws which context the images
see, applies the model, sums the losses and what modules sowed as penalties,
updates the parameters and their moving average, and pushes the batch into the
memory. All randomness is `fold_in(key(seed), step)`. Which context is seen is a
matter of masks, so the step is traced once.

A module adds to the loss by `self.sow('penalties', name, scalar)`; one that is
applied twice adds twice. Images that only fill up a batch are seen by it as by
every other module.

Attributes:
  Batch: `image`, `label`, `index` and `valid`; `image` may be a pytree.
  Metrics: scalars by name, on the device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key

from msba_jax.data.transforms import normalize_image
from msba_jax.losses.term import total_loss
from msba_jax.models import context as contexts
from msba_jax.retrieval.devices import batch_sharding, replicated
from msba_jax.training.experiment import ContextDropout, Experiment
from msba_jax.training.optimizer import frozen_mask
from msba_jax.training.state import TrainState

Batch = dict[str, Any]
Metrics = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

SOLO, MEMORY, BATCH = 0, 1, 2


def make_step(
  experiment: Experiment, optimizer: optax.GradientTransformation
) -> Step:
  """The training step of an experiment, not yet compiled.

  A step whose loss or gradient is not finite changes nothing but the flag
  `state.finite`, and then no later step does: `state.step` keeps the number of
  the step that failed until the host looks.

  Args:
    experiment: model, losses, augmentation and seed.
    optimizer: from `make_optimizer`.

  Returns:
    `(state, batch) -> (state, metrics)`; metrics hold `loss`, the terms,
    `penalty` if the model sows some, `gradient_norm` of what is trained,
    `finite` and `step`.
  """

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(experiment.seed), state.step)
    augment_key, context_key, dropout_key = jax.random.split(key, 3)
    images = prepare_images(batch['image'], augment_key, experiment)
    kind = draw_context(
      context_key, experiment.context_dropout, memory=state.memory is not None
    )
    context = seen_context(kind, batch['valid'], state.memory)

    frozen = frozen_mask(state.params, experiment.optimizer.freeze)

    def loss_of(params):
      params = jax.tree.map(
        lambda stays, leaf: jax.lax.stop_gradient(leaf) if stays else leaf,
        frozen,
        params,
      )
      result: Any = experiment.model.apply(
        {'params': params, **state.statistics},
        images,
        context=context,
        train=True,
        rngs={'dropout': dropout_key},
        mutable=['penalties', *state.statistics],
      )
      (_, out), statistics = result
      loss, terms = total_loss(experiment.losses, out, batch)
      penalties = statistics.pop('penalties', {})
      if penalties:
        penalty: Any = optax.tree.sum(penalties)
        loss, terms = loss + penalty, {**terms, 'penalty': penalty}
      return loss, (terms, out['memory'], statistics)

    (loss, (terms, regions, statistics)), gradients = jax.value_and_grad(
      loss_of, has_aux=True
    )(state.params)
    norm = optax.tree.norm(gradients)
    finite = state.finite & jnp.isfinite(loss) & jnp.isfinite(norm)

    def move(state):
      memory = state.memory
      if memory is not None:
        memory = contexts.push_memory(
          memory, regions, batch['label'], valid=batch['valid']
        )
      moved = _advance(
        state, gradients, frozen, optimizer, experiment.ema_decay
      )
      return dataclasses.replace(moved, memory=memory, statistics=statistics)

    metrics = {
      **terms,
      'loss': loss,
      'gradient_norm': norm,
      'finite': finite,
      'step': state.step,
    }
    # A branch, not a selection: it costs no copies and compiles faster.
    kept = jax.lax.cond(finite, move, lambda state: state, state)
    return dataclasses.replace(kept, finite=finite), metrics

  return step


def compile_step(step: Step, mesh: Mesh) -> Step:
  """Compiles a step for a mesh; the state that goes in is donated.

  Args:
    step: from `make_step`.
    mesh: batches are sharded over it, the state is replicated.

  Returns:
    The step; the buffers of the state that it is given are deleted.
  """
  whole = replicated(mesh)
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(whole, batch_sharding(mesh)),
    out_shardings=whole,
  )


def prepare_images(
  images: Any, key: Key[Array, ''], experiment: Experiment
) -> Any:
  """Augments each image with a key of its own, and normalises pixels.

  What is not uint8, such as cached features, is not normalised.

  Args:
    images: a pytree of arrays (n, …).
    key: image i gets `fold_in(key, i)`.
    experiment: `augment`, `mean` and `std`.

  Returns:
    What the model reads.
  """
  pixels = jax.tree.map(lambda image: image.dtype == jnp.uint8, images)
  if experiment.augment is not None:
    number = jax.tree.leaves(images)[0].shape[0]
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = fold(key, jnp.arange(number))
    images = jax.vmap(experiment.augment)(keys, images)
  normalize = functools.partial(
    normalize_image, mean=experiment.mean, std=experiment.std
  )
  return jax.tree.map(
    lambda image, pixel: normalize(image) if pixel else image, images, pixels
  )


def draw_context(
  key: Key[Array, ''], dropout: ContextDropout, *, memory: bool
) -> Int[Array, '']:
  """Draws what the images of a step see.

  Args:
    key: of the step.
    dropout: probabilities of `solo` and `memory`.
    memory: whether there is one; else the batch is seen in its place.

  Returns:
    SOLO, MEMORY or BATCH.
  """
  draw = jax.random.uniform(key)
  kind = jnp.where(draw < dropout.solo + dropout.memory, MEMORY, BATCH)
  kind = jnp.where(draw < dropout.solo, SOLO, kind)
  return kind if memory else jnp.where(kind == MEMORY, BATCH, kind)


def seen_context(
  kind: Int[Array, ''],
  valid: Bool[Array, ' n'],
  memory: contexts.MemoryBank | None,
) -> contexts.BatchContext:
  """The context of a step: batch and memory, each masked unless it is drawn.

  Args:
    kind: from `draw_context`.
    valid: the images of the batch that are not padding.
    memory: the bank, or None.

  Returns:
    A context for `model.apply`.
  """
  if memory is not None:
    memory = memory._replace(valid=memory.valid & (kind == MEMORY))
  return contexts.batch(valid & (kind == BATCH), memory=memory)


def _advance(
  state: TrainState,
  gradients: Any,
  frozen: Any,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
) -> TrainState:
  """Updates parameters that are not frozen, optimiser, average and step."""
  updates, opt_state = optimizer.update(
    gradients, state.opt_state, state.params
  )
  moved = optax.apply_updates(state.params, updates)
  # A young average would remember the initialisation: it forgets faster.
  age = state.step.astype(jnp.float32)
  decay = jnp.minimum(ema_decay, (1 + age) / (10 + age))
  averaged = optax.incremental_update(moved, state.ema, 1 - decay)
  # Adding zero turns -0.0 into 0.0, and the average of equals is rounded.
  params, ema = (
    jax.tree.map(lambda stays, a, b: a if stays else b, frozen, old, new)
    for old, new in ((state.params, moved), (state.ema, averaged))
  )
  return dataclasses.replace(
    state, params=params, opt_state=opt_state, ema=ema, step=state.step + 1
  )
