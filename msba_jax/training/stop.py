"""Whether somebody asked the training to stop."""

import signal
import threading
from types import TracebackType

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """Turns SIGTERM into a question that the loop asks after each step.

  Several processes must stop after the same step: then JAX's own handler
  listens, and they agree on one.
  """

  def __init__(self):
    self._asked = False
    self._before = None

  def __enter__(self) -> 'StopRequest':
    main = threading.current_thread() is threading.main_thread()
    if jax.process_count() == 1 and main:
      self._before = signal.signal(signal.SIGTERM, self._ask)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def requested(self, step: int) -> bool:
    """Whether to stop after this step.

    Args:
      step: steps done, the same in all processes.

    Returns:
      The same in all processes.
    """
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked

  def _ask(self, number, frame) -> None:
    del number, frame
    self._asked = True
