"""How a training ends other than by reaching its last step."""

from collections.abc import Mapping, Sequence


class NonFiniteLossError(FloatingPointError):
  """The loss or its gradient became NaN or infinite.

  The state of the run is that before the step; nothing of the step was kept.

  Attributes:
    step: the step that failed, counted from 0.
    indices: the images of its batch, as indices into the training source.
    ids: their names.
    values: the terms of the loss and the norm of the gradient.
  """

  def __init__(
    self,
    step: int,
    *,
    indices: Sequence[int],
    ids: Sequence[str],
    values: Mapping[str, float],
  ):
    self.step = step
    self.indices = tuple(indices)
    self.ids = tuple(ids)
    self.values = dict(values)
    numbers = ', '.join(f'{name} {value:g}' for name, value in values.items())
    super().__init__(
      f'step {step} gave a loss or gradient that is not finite ({numbers}); '
      f'its batch holds the images {list(self.indices)}: {", ".join(ids)}'
    )


class TrainingStopped(KeyboardInterrupt):
  """The training was asked to stop, and saved a checkpoint before it did.

  The same call continues it. Like Ctrl-C it is no `Exception`, so that nothing
  on the way takes it for a failure.

  Attributes:
    step: steps done.
  """

  def __init__(self, step: int):
    self.step = step
    super().__init__(
      f'stopped after step {step}, a checkpoint is saved; the same command '
      'continues'
    )
