"""How fast a training goes, and how long it waits for data."""

import contextlib
import time
from collections.abc import Iterator


class Meter:
  """Counts steps and seconds, without what is not training.

  Attributes:
    cold: True until `start`.
  """

  def __init__(self):
    self.cold = True
    self._begun = 0.0
    self._waited = 0.0
    self._steps = 0

  def start(self) -> None:
    """Begins to count."""
    self.cold = False
    self._begun, self._waited, self._steps = time.perf_counter(), 0.0, 0

  def count(self) -> None:
    """One more step is done."""
    self._steps += 1

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Time in here is spent waiting for data."""
    before = time.perf_counter()
    yield
    self._waited += time.perf_counter() - before

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Time in here is not training: evaluation, saving."""
    before = time.perf_counter()
    yield
    self._begun += time.perf_counter() - before

  def take(self, *, images: int) -> dict[str, float]:
    """Speed since the last call, then counts from zero.

    Args:
      images: of one step.

    Returns:
      `images_per_second` and `data_wait`, the share of time that the loop
      waited for data; nothing if no step was measured.
    """
    if self.cold or not self._steps:
      return {}
    seconds = max(time.perf_counter() - self._begun, 1e-9)
    steps, waited = self._steps, self._waited
    self.start()
    return {
      'images_per_second': steps * images / seconds,
      'data_wait': min(waited / seconds, 1.0),
    }
