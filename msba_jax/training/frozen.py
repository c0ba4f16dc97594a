"""Training heads on the grids of a backbone that is not trained any more.

Where only heads differ, the backbone of a finished run is kept as it is: its
grids are computed once for every image, plain and under a few augmentations,
written beside that run, and found again by every later training. The weights
that such a training leaves hold the backbone as well, so that its run embeds
images as any other does. A fuser of grids belongs to the head.

Attributes:
  FeatureSource: grids in place of pictures.
  Frozen: an experiment on grids, and the parameters that it leaves alone.
  freeze: computes what is missing.
  standing_digest: tells the backbone of an experiment from another one.
  refuse_other_backbone: where that is not the one something was made with.
  with_backbone: adds what was left alone to what was trained.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msba_jax.data.directory import (
  MANIFEST,
  BrokenError,
  atomic_directory,
  read_manifest,
  write_manifest,
)
from msba_jax.data.errors import InputError
from msba_jax.data.prefetch import batches
from msba_jax.data.progress import progress_bar
from msba_jax.data.source import Evaluation, Fingerprinted, Source, Splits
from msba_jax.data.transforms import normalize_image
from msba_jax.models.backbones.precomputed import Precomputed
from msba_jax.retrieval.fingerprint import model_fingerprint
from msba_jax.training.backbone import (
  backbone_path,
  read_backbone,
  without_fusers,
)
from msba_jax.training.begin import placed
from msba_jax.training.configuration import describe
from msba_jax.training.experiment import Experiment

_BATCH = 256


class FeatureSource:
  """Grids of a frozen backbone, with the labels of the images.

  Views follow each other: image i under view v stands at v · n + i.

  Args:
    levels: memory-mapped grids, (views · n, y, x, d) each.
    source: the images they were computed from.
  """

  def __init__(self, levels: tuple[np.ndarray, ...], source: Source):
    views = len(levels[0]) // len(source)
    self._levels = levels
    self.labels = np.tile(source.labels, views)
    self.class_names = source.class_names
    self.ids = tuple(
      image if view == 0 else f'{image} (view {view})'
      for view in range(views)
      for image in source.ids
    )

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> Any:
    """The grids stand where a picture does."""
    grids = tuple(np.asarray(level[index]) for level in self._levels)
    return {'image': grids, 'label': int(self.labels[index])}


class Frozen(NamedTuple):
  """What `freeze` returns.

  Attributes:
    experiment: the same, with a model that takes grids.
    splits: grids in place of pictures; the test split is left as it is.
    backbone: its variables, which are not trained: parameters, statistics.
    path: where they belong among those of the whole model.
    digest: of these.
  """

  experiment: Experiment
  splits: Splits
  backbone: Any
  path: tuple[str, ...]
  digest: str


def freeze(
  experiment: Experiment, splits: Splits, *, progress: bool = True
) -> Frozen:
  """Takes the backbone of a finished run and computes its grids.

  Args:
    experiment: with `frozen_backbone` set; its model has the same backbone,
      which may be inside of a `FusedBackbone`.
    splits: the images.
    progress: whether bars are shown.

  Returns:
    What to train instead.

  Raises:
    InputError: there is no finished run, its backbone is another, or a source
      cannot tell what its pictures depend on.
  """
  run, model = Path(experiment.frozen_backbone), experiment.model
  path, experiment = backbone_path(model), without_fusers(experiment)
  backbone = read_backbone(run, experiment)
  digest = _digest(experiment, backbone)
  compute = functools.partial(
    _features, experiment, backbone, digest, run / 'features', progress
  )
  train = compute(splits.train, views=experiment.frozen_views)
  queries, gallery = splits.validation
  validation = Evaluation(
    compute(queries, views=1),
    None if gallery is None else compute(gallery, views=1),
  )
  return Frozen(
    dataclasses.replace(
      experiment, model=_replaced(model, path, Precomputed()), augment=None
    ),
    splits._replace(train=train, validation=validation),
    backbone,
    path,
    digest,
  )


def standing_digest(experiment: Experiment) -> str | None:
  """Tells the backbone that an experiment is trained on from another one.

  Args:
    experiment: with or without `frozen_backbone`.

  Returns:
    As `Frozen.digest`; None where no backbone is frozen, or it is gone.

  Raises:
    InputError: it is not a backbone of this experiment.
  """
  run = Path(experiment.frozen_backbone)
  finished = (run / 'weights' / MANIFEST).exists() or (run / MANIFEST).exists()
  if not experiment.frozen_backbone or not finished:
    return None
  experiment = without_fusers(experiment)
  return _digest(experiment, read_backbone(run, experiment))


def refuse_other_backbone(
  experiment: Experiment, made_with: str | None, now: str | None, place: Path
) -> None:
  """Stops where a backbone was trained anew since something was made with it.

  Args:
    experiment: with or without `frozen_backbone`.
    made_with: the digest of the backbone then.
    now: from `standing_digest`; with None nothing is refused.
    place: what was made.

  Raises:
    InputError: the two digests differ.
  """
  if now is not None and made_with != now:
    raise InputError(
      f'{place} was made with another backbone than now stands in '
      f'{experiment.frozen_backbone}; remove it or choose another directory'
    )


def with_backbone(frozen: Frozen, trained: Mapping[str, Any]) -> dict[str, Any]:
  """Adds what was left alone to what was trained.

  Args:
    frozen: from `freeze`.
    trained: collections of variables, without the backbone.

  Returns:
    All collections of the whole model.
  """
  return dict(trained) | {
    name: placed(trained.get(name, {}), frozen.path, backbone)
    for name, backbone in frozen.backbone.items()
  }


def _digest(experiment: Experiment, backbone: Any) -> str:
  """What decides the grids of an image."""
  return model_fingerprint(
    experiment.model.backbone,
    backbone['params'],
    experiment.mean,
    experiment.std,
    *(backbone[name] for name in sorted(backbone) if name != 'params'),
  )


def _replaced(module: Any, path: tuple[str, ...], other: nn.Module) -> Any:
  """The module with another one at a path."""
  if not path:
    return other
  part = _replaced(getattr(module, path[0]), path[1:], other)
  return module.clone(**{path[0]: part})


def _features(
  experiment: Experiment,
  backbone: Any,
  digest: str,
  directory: Path,
  progress: bool,
  source: Source,
  *,
  views: int,
) -> FeatureSource:
  """Opens the grids of a source, computed before or now."""
  if not isinstance(source, Fingerprinted):
    raise InputError(
      f'the data of {experiment.name} cannot tell what its pictures depend on; '
      'set data.cache_dir'
    )
  augment = describe(experiment.augment) if views > 1 else None
  facts = [source.fingerprint(), digest, views, augment]
  key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
  goal = directory / key
  if not (goal / MANIFEST).exists():
    with atomic_directory(goal) as partial:
      _write(experiment, backbone, source, partial, views, progress)
      write_manifest(partial, {'views': views, 'backbone': digest})
  # Computed a moment ago or before: the hashes are those of what was written.
  try:
    files = sorted(read_manifest(goal)['files'])
  except BrokenError as error:
    raise InputError(f'{error}: remove {goal}') from error
  levels = tuple(np.load(goal / name, mmap_mode='r') for name in files)
  return FeatureSource(levels, source)


def _write(
  experiment: Experiment,
  backbone: Any,
  source: Source,
  directory: Path,
  views: int,
  progress: bool,
) -> None:
  """Computes all views of all images, one file a level."""
  levels: list[np.ndarray] = []
  compute = _compile(experiment)
  steps = -(-len(source) // _BATCH)

  def plan(step: int) -> np.ndarray:
    first = step * _BATCH
    return np.minimum(np.arange(first, first + _BATCH), len(source) - 1)

  with progress_bar(
    views * len(source), desc='features', unit='image',
    disable=not progress,
  ) as bar:  # fmt: skip
    for view in range(views):
      for batch in batches(source, plan, start=0, stop=steps, threads=1):
        start = batch['step'] * _BATCH
        count = min(_BATCH, len(source) - start)
        indices = batch['index'].astype(np.int32)
        grids = compute(backbone, batch['image'], indices, np.int32(view))
        for i, grid in enumerate(jax.device_get(grids)):
          if len(levels) == i:
            levels.append(
              np.lib.format.open_memmap(
                directory / f'level_{i}.npy',
                mode='w+',
                dtype=np.float16,
                shape=(views * len(source), *grid.shape[1:]),
              )
            )
          row = view * len(source) + start
          levels[i][row : row + count] = grid[:count]
        bar.update(count)
  for level in levels:
    level.flush()  # pyright: ignore[reportAttributeAccessIssue]


def _compile(experiment: Experiment) -> Any:
  """`(variables, images, indices, view) → grids`; view 0 is the plain image."""

  @jax.jit
  def compute(variables: Any, images: Any, indices: Any, view: Any) -> Any:
    pixels = images.astype(jnp.float32)
    if experiment.augment is not None:
      key = jax.random.fold_in(jax.random.key(0), view)
      keys = jax.vmap(functools.partial(jax.random.fold_in, key))(indices)
      changed = jax.vmap(experiment.augment)(keys, images)
      pixels = jnp.where(view > 0, changed.astype(jnp.float32), pixels)
    grids = experiment.model.backbone.apply(
      variables,
      normalize_image(pixels, mean=experiment.mean, std=experiment.std),
      train=False,
    )
    return jax.tree.map(lambda grid: grid.astype(jnp.float16), grids)

  return compute
