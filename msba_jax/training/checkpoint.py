"""Checkpoints that are restored exactly or not at all.

A small interface over Orbax. Orbax writes a step in one piece, but restores
flipped bits silently, gives broken or empty steps out as the latest, and casts
to a dtype that was not saved. So each step has a manifest with the SHA-256 of
its files and the shape and dtype of its arrays; a step that does not agree with
its manifest is put aside, and the one before it counts.

Attributes:
  Checkpoints: the checkpoints of one run.
  flatten, unflatten: a pytree as leaves by name, and back.
  specification, compare_specifications: shapes and dtypes of leaves.
"""

import math
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
  AnyPreservationPolicy,
  BestN,
  LatestN,
  PreservationPolicy,
)

from msba_jax.data.directory import (
  MANIFEST,
  BrokenError,
  read_manifest,
  write_manifest,
)
from msba_jax.data.errors import InputError

Leaves = dict[str, np.ndarray]


class Checkpoints:
  """The checkpoints of one run.

  Args:
    directory: made if it does not exist.
    keep: how many of the latest stay.
    keep_best: whether the one with the best score stays as well.
  """

  def __init__(
    self, directory: Path, *, keep: int = 2, keep_best: bool = False
  ):
    self._directory = directory.resolve()
    self._directory.mkdir(parents=True, exist_ok=True)
    self._latest = _clean(self._directory)
    policies: list[PreservationPolicy] = [LatestN(keep)]
    if keep_best:
      policies.append(BestN(get_metric_fn=_score, n=1))
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        enable_async_checkpointing=False,
        preservation_policy=AnyPreservationPolicy(policies),
      ),
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

  @property
  def latest(self) -> int | None:
    """The newest good step."""
    return self._latest

  @property
  def steps(self) -> Sequence[int]:
    """All steps that are kept, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, tree: Any, *, score: float | None = None) -> None:
    """Writes a pytree of host arrays as a step; returns when it stands.

    Args:
      step: newer than every step before it.
      tree: arrays on the host: a donated device buffer could change while it
        is written.
      score: what the best checkpoint is best at, larger is better.
    """
    leaves = flatten(tree)
    full = {name: leaf for name, leaf in leaves.items() if leaf.size}
    self._manager.save(
      step, args=ocp.args.PyTreeSave(full), metrics={'score': score}
    )
    if jax.process_index() == 0:
      facts = {'step': step, 'score': score, 'leaves': specification(leaves)}
      write_manifest(self._directory / str(step), facts)
    self._latest = step

  def restore(self, target: Any, *, step: int | None = None) -> Any:
    """Reads a step.

    Args:
      target: a pytree of arrays or `jax.ShapeDtypeStruct`: what is expected.
      step: the newest good one by default.

    Returns:
      A pytree of host arrays with the structure of the target.

    Raises:
      InputError: there is no such step, or it has other arrays than expected.
    """
    step = self._latest if step is None else step
    if step is None or step not in self._manager.all_steps():
      raise InputError(
        f'{self._directory} has no checkpoint{f" {step}" if step else ""}; '
        'train the run again'
      )
    where = self._directory / str(step)
    try:
      facts = read_manifest(where)
    except BrokenError as error:
      raise InputError(f'checkpoint is broken: {error}; remove it') from error
    expected = specification(flatten(target, read=False))
    compare_specifications(facts['leaves'], expected, where=where)
    full = [n for n, (shape, _) in expected.items() if math.prod(shape)]
    plain = ocp.RestoreArgs(restore_type=np.ndarray)
    found = self._manager.restore(
      step,
      args=ocp.args.PyTreeRestore(restore_args=dict.fromkeys(full, plain)),
    )
    empty = {
      name: np.zeros(shape, dtype)
      for name, (shape, dtype) in expected.items()
      if name not in found
    }
    leaves = {**found, **empty}
    compare_specifications(specification(leaves), expected, where=where)
    return unflatten(leaves, target)

  def best(self) -> int | None:
    """The step with the best score, None if no step was scored."""
    scores = {}
    for step in self.steps:
      score = read_manifest(self._directory / str(step)).get('score')
      if score is not None:
        scores[step] = score
    return max(scores, key=lambda step: (scores[step], step), default=None)

  def close(self) -> None:
    """Frees what Orbax holds."""
    self._manager.close()


def flatten(tree: Any, *, read: bool = True) -> dict[str, Any]:
  """Leaves by their path, such as `params.head.kernel`.

  Args:
    tree: a pytree.
    read: whether leaves become NumPy arrays.

  Returns:
    The leaves in the order of the tree.
  """
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {_name(p): np.asarray(leaf) if read else leaf for p, leaf in paths}


def unflatten(leaves: Leaves, target: Any) -> Any:
  """The inverse of `flatten`; the target gives the structure."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: leaves[_name(path)], target
  )


def specification(leaves: dict[str, Any]) -> dict[str, list[Any]]:
  """Shape and dtype of each leaf, as JSON values."""
  return {
    name: [list(leaf.shape), str(np.dtype(leaf.dtype))]
    for name, leaf in leaves.items()
  }


def compare_specifications(found: Any, expected: Any, *, where: Path) -> None:
  """Raises InputError for the first leaf that is not as expected."""
  for name in sorted({*found, *expected}):
    if found.get(name) != expected.get(name):
      raise InputError(
        f'{where} holds {name} as {found.get(name, "nothing")} where the '
        f'experiment has {expected.get(name, "nothing")}; use the experiment '
        'that wrote it or another directory'
      )


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _score(metrics: Any) -> float:
  return -math.inf if metrics['score'] is None else metrics['score']


def _clean(directory: Path) -> int | None:
  """Removes unfinished steps, renames broken ones, returns the newest good.

  The steps before that one are not read.
  """
  first = jax.process_index() == 0
  for path in directory.glob('*.orbax-checkpoint-tmp*') if first else ():
    shutil.rmtree(path, ignore_errors=True)
  steps = sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())
  for step in reversed(steps):
    path = directory / str(step)
    try:
      read_manifest(path)
    except BrokenError as error:
      warnings.warn(f'skipping checkpoint {step}: {error}', stacklevel=3)
      if first and (path / MANIFEST).exists():
        path.rename(directory / f'broken-{step}-{os.getpid()}')
      elif first:
        shutil.rmtree(path)
    else:
      return step
  return None
