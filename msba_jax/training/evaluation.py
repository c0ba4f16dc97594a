"""The evaluation inside the training loop.

Attributes:
  make_validation: scores a state on the validation split.
"""

from collections.abc import Callable

from msba_jax.data.source import Evaluation
from msba_jax.retrieval.embed import Embedder
from msba_jax.retrieval.evaluate import average, evaluate_modes
from msba_jax.training.mesh import host_copy
from msba_jax.training.state import TrainState


def make_validation(
  embedder: Embedder, evaluation: Evaluation, *, batch_size: int
) -> Callable[[TrainState], dict[str, float]]:
  """The evaluation inside the training loop: `state -> mean scores`.

  Args:
    embedder: the model; its parameters become the moving average at each call.
    evaluation: queries and gallery.
    batch_size: images per step of embedding.

  Returns:
    A function that compiles once.
  """

  def validate(state: TrainState) -> dict[str, float]:
    scores = evaluate_modes(
      embedder.with_params(*host_copy((state.ema, state.statistics))),
      evaluation,
      modes=('solo',),
      batch_size=batch_size,
      progress=False,
    )
    return average(scores['solo'])

  return validate
