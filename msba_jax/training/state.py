"""Everything that a training changes, as one pytree.

Attributes:
  TrainState: parameters, optimiser, moving average, statistics, memory, step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from msba_jax.models import context as contexts
from msba_jax.training.experiment import Experiment


@struct.dataclass
class TrainState:
  """What goes into a step and comes out of it.

  Leaves are arrays on devices or on the host, or only shapes.

  Attributes:
    step: steps done, an int32 scalar.
    finite: False once a loss was not finite; no step changes the state then.
    params: parameters of the model.
    opt_state: of the optimiser.
    ema: moving average of the parameters.
    statistics: what a model carries beside its parameters, such as the running
      means of batch normalisation: collections by name, {} if there is none.
    memory: a `MemoryBank` with the regions of each class, or None.
  """

  step: Any
  finite: Any
  params: Any
  opt_state: Any
  ema: Any
  statistics: Any
  memory: Any


def create_state(
  experiment: Experiment,
  optimizer: optax.GradientTransformation,
  images: Any,
) -> TrainState:
  """The state before the first step, a function of the seed.

  Args:
    experiment: the model and the sizes.
    optimizer: from `make_optimizer`.
    images: a few model inputs, for their shapes; pixels or cached grids.

  Returns:
    The state, on the default device.
  """
  model = experiment.model

  def create(images):
    images = jax.tree.map(lambda image: image.astype(jnp.float32), images)
    key = jax.random.key(experiment.seed)
    statistics: Any = model.init(key, images, context=contexts.solo)
    params = statistics.pop('params')
    statistics.pop('penalties', None)
    memory = None
    if experiment.memory_size:
      regions: Any = model.apply(
        {'params': params, **statistics}, images, method='encode'
      )
      levels, _, number, features = regions.shape
      memory = contexts.create_memory(
        experiment.memory_size,
        levels=levels,
        regions=number,
        features=features,
      )
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      finite=jnp.ones((), bool),
      params=params,
      opt_state=optimizer.init(params),
      ema=jax.tree.map(jnp.copy, params),
      statistics=statistics,
      memory=memory,
    )

  # It runs once: what is saved by optimising the code is less than it costs.
  on_cpu = jax.default_backend() == 'cpu'
  fast = {'xla_backend_optimization_level': 0} if on_cpu else None
  return jax.jit(create, compiler_options=fast)(images)


def parameter_count(params: Any) -> int:
  """How many numbers a model has.

  Args:
    params: a pytree of arrays or shapes.

  Returns:
    The sum of the sizes of its leaves.
  """
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
