"""Whether somebody asked the training to stop."""

import signal
import threading
from types import TracebackType

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """Turns signals into a question that the loop asks after each step.

  SIGTERM stops and saves. SIGINT interrupts after the step, where nothing is
  half done: inside of a library it may leave a lock held, or get lost in a
  callback. A second SIGINT interrupts at once.

  Several processes must stop after the same step: then JAX's own handler
  listens, and they agree on one.
  """

  def __init__(self):
    self._asked = False
    self._interrupted = False
    self._before = {}

  def __enter__(self) -> 'StopRequest':
    main = threading.current_thread() is threading.main_thread()
    if jax.process_count() == 1 and main:
      self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)
      if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        self._before[signal.SIGINT] = signal.signal(
          signal.SIGINT, self._interrupt
        )
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def requested(self, step: int) -> bool:
    """Whether to stop after this step.

    Args:
      step: steps done, the same in all processes.

    Returns:
      The same in all processes.

    Raises:
      KeyboardInterrupt: SIGINT came.
    """
    if self._interrupted:
      raise KeyboardInterrupt
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked

  def _interrupt(self, number, frame) -> None:
    del number, frame
    if self._interrupted:
      raise KeyboardInterrupt
    self._interrupted = True

  def _ask(self, number, frame) -> None:
    del number, frame
    self._asked = True
