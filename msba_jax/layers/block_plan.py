"""How attention over chosen blocks is cut into steps and kernels.

A step takes a group of blocks of queries and some of the blocks of keys that
they name, and what it finds is added to what other steps found. A kernel takes
all of them, and gives no log-normalisers, which only gradients need.

Attributes:
  BlockPlan: the static facts of a call of `sparse_attention`.
  plan_blocks: a plan from the sizes of a call.
"""

import dataclasses

import jax

__all__ = ['BlockPlan', 'plan_blocks']

# Queries and keys of a step on CPU: large enough for the matrix products, small
# enough for the cache.
STEP = (512, 1024)
# Queries of a step from which XLA makes one kernel of a softmax and both of its
# products there, so that no scores are written; the smallest blocks of queries
# and the most scores of one for which that kernel is ahead.
KERNEL_QUERIES = 4096
KERNEL_ROWS = 16
KERNEL_SCORES = 96 * 1024


@dataclasses.dataclass(frozen=True)
class BlockPlan:
  """The static facts of a call of `sparse_attention`.

  Attributes:
    rows: queries of a block.
    columns: keys of a block.
    group: blocks of queries of a step, all of one head; 0 is all.
    slots: blocks of keys of a step.
    kernel: blocks of queries of a kernel, of any heads.
    widths: blocks of keys of a kernel, ascending; rows that name more are taken
      in steps.
    leading: blocks of keys in front that all rows read.
    scale: factor of the products.
    precision: of the matrix products.
    indices_of: the choice of every head, an index into the leading axis.
    together: whether all heads run at once, or one after the other.
  """

  rows: int
  columns: int
  group: int
  slots: int
  kernel: int
  widths: tuple[int, ...]
  leading: int
  scale: float
  precision: jax.lax.PrecisionLike
  indices_of: tuple[int, ...]
  together: bool


def plan_blocks(
  rows: int,
  columns: int,
  *,
  count: int,
  keep: int,
  scale: float,
  indices_of: tuple[int, ...],
  precision: jax.lax.PrecisionLike = None,
  leading: int = 0,
  shares: int = 1,
  wide: bool = False,
) -> BlockPlan:
  """Steps of a size that suits the platform.

  Args:
    rows: queries of a block.
    columns: keys of a block.
    count: blocks of queries.
    keep: blocks that a row may name, beside the leading ones.
    scale: factor of the products.
    indices_of: the choice of every head.
    precision: of the matrix products.
    leading: blocks of keys that all rows read.
    shares: into how many calls the keys are divided, each with its part of what
      a row names.
    wide: whether most rows name fewer blocks than they may.

  Returns:
    The plan.
  """
  together = jax.default_backend() != 'cpu'
  keep += leading
  most = max(1, min(STEP[1] // columns, -(-keep // shares)))
  slots = max(1, -(-keep // max(4 if wide else 1, -(-keep // most))))
  group, kernel, widths = 0, 0, set()
  if not together:
    group = max(1, min(STEP[0] // rows, count))
    blocks = count * len(indices_of)
    kernel = -(-blocks // max(1, blocks * rows // KERNEL_QUERIES))
    limit = KERNEL_SCORES // (rows * columns)
    free = min(keep, limit) - leading
    # What is merged with other shares needs normalisers.
    fits = rows >= KERNEL_ROWS and (wide or keep <= limit)
    if free > 0 and shares == 1 and fits:
      eighths = range(1 if wide else 2, 9, 1 if wide else 2)
      widths = {leading + -(-free * x // 8) for x in eighths}
  return BlockPlan(
    rows=rows,
    columns=columns,
    group=group,
    slots=slots,
    kernel=kernel,
    widths=tuple(sorted(widths)),
    leading=leading,
    scale=scale,
    precision=precision,
    indices_of=indices_of,
    together=together,
  )
