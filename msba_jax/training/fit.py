"""The loop around the step: reads batches, logs, evaluates, saves, stops.

The host runs a few steps ahead of the devices and looks at a step's numbers
when they are there, so that nothing waits for a log line. Everything that a
step depends on is a function of (seed, step); a loop that starts at the step of
a checkpoint goes on as if it had never stopped.

Attributes:
  Loop: what a loop works with.
  fit: runs it.
"""

import collections
import contextlib
from collections.abc import Callable, Generator
from typing import NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from msba_jax.data.plan import class_index, plan_batch
from msba_jax.data.prefetch import batches
from msba_jax.data.progress import progress_bar
from msba_jax.data.source import Source
from msba_jax.training.checkpoint import Checkpoints
from msba_jax.training.errors import NonFiniteLossError, TrainingStopped
from msba_jax.training.experiment import Experiment
from msba_jax.training.mesh import (
  global_batch,
  host_copy,
  padded_size,
  process_rows,
)
from msba_jax.training.meter import Meter
from msba_jax.training.record import MetricsLog
from msba_jax.training.state import TrainState
from msba_jax.training.step import Batch, Metrics, Step
from msba_jax.training.stop import StopRequest

_AHEAD = 2  # steps that may run while the host prepares the next


class Loop(NamedTuple):
  """What a loop works with.

  Attributes:
    experiment: the numbers.
    source: the training images.
    mesh: over which batches are sharded.
    step: compiled.
    evaluate: scores the moving average on the validation split.
    checkpoints: of the run.
    log: of the run; None in the processes that do not write.
    progress: whether a bar is shown.
  """

  experiment: Experiment
  source: Source
  mesh: Mesh
  step: Step
  evaluate: Callable[[TrainState], dict[str, float]]
  checkpoints: Checkpoints
  log: MetricsLog | None
  progress: bool


def fit(loop: Loop, state: TrainState, *, until: int | None) -> TrainState:
  """Trains from the state's step to the experiment's last.

  Args:
    loop: what it works with.
    state: on the devices of the mesh; it is donated.
    until: stops after this many steps, as a signal would.

  Returns:
    The state after the last step, which is saved.

  Raises:
    NonFiniteLossError: a loss or gradient is not finite.
    TrainingStopped: a signal or `until` ended the training; it is saved.
  """
  experiment = loop.experiment
  start, steps = int(state.step), experiment.steps
  bar = progress_bar(
    steps,
    initial=start,
    desc=f'train {experiment.name}',
    unit='step',
    disable=not loop.progress,
  )
  reader = _Reader(loop, bar)
  stream = contextlib.closing(_batches(loop, start=start, stop=steps))
  with bar, stream as stream, StopRequest() as stop:
    for done in range(start + 1, steps + 1):
      with reader.meter.waiting():
        batch = next(stream)
      state, metrics = loop.step(state, batch)
      reader.add(done, metrics)
      stopped = stop.requested(done) or done == until
      evaluated = _due(done, experiment.evaluate_every, steps)
      saved = _due(done, experiment.checkpoint_every, steps)
      if evaluated or saved or stopped:
        reader.drain()
        with reader.meter.paused():
          score = _evaluate(loop, state, done) if evaluated else None
          loop.checkpoints.save(done, host_copy(state), score=score)
      if stopped and done < steps:
        raise TrainingStopped(done)
  return state


class _Reader:
  """Reads the numbers of steps when they are there, in order.

  Args:
    loop: experiment and log.
    bar: is moved on.
  """

  def __init__(self, loop: Loop, bar: tqdm):
    self.meter = Meter()
    self._loop = loop
    self._bar = bar
    self._pending: collections.deque[tuple[int, Metrics]] = collections.deque()
    self._rows: list[dict[str, float]] = []

  def add(self, done: int, metrics: Metrics) -> None:
    """Notes a step that was started; reads those that are long enough ago."""
    self._pending.append((done, metrics))
    if self.meter.cold:  # the first step compiles: it is not counted
      self.drain()
      self.meter.start()
    while len(self._pending) > _AHEAD:
      self._read()

  def drain(self) -> None:
    """Reads all that were started."""
    while self._pending:
      self._read()

  def _read(self) -> None:
    done, metrics = self._pending.popleft()
    values = {name: float(v) for name, v in jax.device_get(metrics).items()}
    finite = values.pop('finite')
    values.pop('step')
    if not finite:
      raise _failure(self._loop, done - 1, values)
    self._rows.append(values)
    self.meter.count()
    self._bar.update()
    experiment = self._loop.experiment
    if _due(done, experiment.log_every, experiment.steps):
      self._write(done)

  def _write(self, done: int) -> None:
    """Logs the means since the last line."""
    rows, self._rows = self._rows, []
    means = {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
    speed = self.meter.take(images=self._loop.experiment.batch_size)
    if self._loop.log is not None:
      line = {**means, 'averaged_steps': len(rows), **speed}
      self._loop.log.write(done, 'train', line)
    self._bar.set_postfix(loss=f'{means["loss"]:.4g}', refresh=False)


def plan_indices(
  experiment: Experiment, source: Source
) -> Callable[[int], np.ndarray]:
  """The images of a step, as a function of the step.

  Args:
    experiment: classes and images per batch, and the seed.
    source: the training images.

  Returns:
    `step -> indices`.
  """
  index = class_index(source.labels)

  def plan(step: int) -> np.ndarray:
    return plan_batch(
      index,
      seed=experiment.seed,
      step=step,
      classes=experiment.classes_per_batch,
      images=experiment.images_per_class,
    ).indices

  return plan


def _batches(
  loop: Loop, *, start: int, stop: int
) -> Generator[Batch, None, None]:
  """Global batches on the devices, filled up to a multiple of the devices."""
  size = loop.experiment.batch_size
  padded = padded_size(loop.mesh, size)
  rows = process_rows(loop.mesh, padded)
  valid = (np.arange(padded) < size)[rows]
  plan = plan_indices(loop.experiment, loop.source)

  def plan_rows(step: int) -> np.ndarray:
    return np.resize(plan(step), padded)[rows]

  read = batches(loop.source, plan_rows, start=start, stop=stop)
  with contextlib.closing(cast(Generator[Batch, None, None], read)) as read:
    for batch in read:
      arrays = {name: batch[name] for name in ('image', 'label')}
      # JAX has no int64 by default, and no collection needs it.
      arrays['index'] = batch['index'].astype(np.int32)
      arrays['valid'] = valid
      yield global_batch(loop.mesh, arrays, size=padded)


def _evaluate(loop: Loop, state: TrainState, done: int) -> float:
  """Scores the moving average, logs, and returns what `best` goes by."""
  scores, metric = loop.evaluate(state), loop.experiment.evaluation.metric
  if loop.log is not None:
    loop.log.write(done, 'validation', scores)
  return scores[metric]


def _failure(
  loop: Loop, step: int, values: dict[str, float]
) -> NonFiniteLossError:
  """The error that names the batch of a step."""
  plan = plan_indices(loop.experiment, loop.source)
  indices = [int(i) for i in plan(step)]
  ids = [loop.source.ids[i] for i in indices]
  return NonFiniteLossError(step, indices=indices, ids=ids, values=values)


def _due(done: int, every: int, steps: int) -> bool:
  return every > 0 and (done % every == 0 or done == steps)
