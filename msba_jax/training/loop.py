"""Training: sets a run directory up, or takes up what stands there.

Attributes:
  train: trains an experiment into a run directory.
"""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from msba_jax.data.atomic import write_json
from msba_jax.data.directory import MANIFEST
from msba_jax.data.errors import InputError
from msba_jax.data.source import Splits
from msba_jax.retrieval.devices import copy_to_all, data_mesh
from msba_jax.training.begin import begin_pretrained
from msba_jax.training.checkpoint import Checkpoints
from msba_jax.training.configuration import configuration_hash
from msba_jax.training.evaluation import make_validation
from msba_jax.training.experiment import Experiment
from msba_jax.training.fit import Loop, fit
from msba_jax.training.frozen import (
  Frozen,
  freeze,
  refuse_other_backbone,
  standing_digest,
  with_backbone,
)
from msba_jax.training.load import elsewhere, split_source
from msba_jax.training.lock import LOCK, only_one
from msba_jax.training.mesh import host_copy
from msba_jax.training.optimizer import make_optimizer
from msba_jax.training.record import MetricsLog, environment
from msba_jax.training.run import Run, load_run, make_embedder, read_record
from msba_jax.training.state import TrainState, create_state, parameter_count
from msba_jax.training.step import compile_step, make_step
from msba_jax.training.weights import save_weights


def train(
  experiment: Experiment,
  directory: str | Path,
  *,
  devices: Sequence[Any] | None = None,
  progress: bool = True,
  until: int | None = None,
) -> Run:
  """Trains an experiment, or goes on where the directory's run was stopped.

  Args:
    experiment: what to train.
    directory: of the run.
    devices: all devices of all processes by default.
    progress: whether bars are shown.
    until: stops after this many steps; the same call without it goes on.

  Returns:
    The finished run.

  Raises:
    InputError: the directory holds a run of another configuration, another
      process trains in it, or the data cannot be read.
    NonFiniteLossError: a loss or gradient is not finite.
    TrainingStopped: SIGTERM or `until` ended the training; it is saved.
  """
  directory = Path(directory)
  _prepare(directory, experiment)
  if (directory / 'weights' / MANIFEST).exists():
    made_with = read_record(directory).get('frozen_backbone')
    now = standing_digest(experiment)
    refuse_other_backbone(experiment, made_with, now, directory)
    return load_run(directory, experiment)
  first = jax.process_index() == 0
  with only_one(directory) if first else contextlib.nullcontext():
    return _train(
      experiment, directory, devices, progress=progress and first, until=until
    )


def _train(
  experiment: Experiment,
  directory: Path,
  devices: Sequence[Any] | None,
  *,
  progress: bool,
  until: int | None,
) -> Run:
  """Trains in a directory that was prepared and is held."""
  given, splits, frozen = experiment, experiment.data.open(), None
  if experiment.frozen_backbone:
    frozen = freeze(experiment, splits, progress=progress)
    experiment, splits = frozen.experiment, frozen.splits
  mesh = data_mesh(devices)
  optimizer = make_optimizer(experiment.optimizer, steps=experiment.steps)
  images = jax.tree.map(lambda a: np.asarray(a)[None], splits.train[0]['image'])
  state = create_state(experiment, optimizer, images)
  if jax.process_index() == 0:
    _note(directory, given, state, splits, frozen)
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(
      Checkpoints(
        directory / 'checkpoints', keep_best=experiment.evaluate_every > 0
      )
    )
    if checkpoints.latest is not None:
      state = checkpoints.restore(state)
    elif experiment.pretrained:
      state = begin_pretrained(experiment, state)
    log = None
    if jax.process_index() == 0:
      log = stack.enter_context(MetricsLog(directory, step=int(state.step)))
    loop = Loop(
      experiment=experiment,
      source=splits.train,
      mesh=mesh,
      step=compile_step(make_step(experiment, optimizer), mesh),
      evaluate=make_validation(
        make_embedder(experiment, state.params, state.statistics),
        splits.validation,
        batch_size=experiment.evaluation.batch_size,
      ),
      checkpoints=checkpoints,
      log=log,
      progress=progress,
    )
    state = copy_to_all(host_copy(state), mesh)
    state = fit(loop, state, until=until)
  if jax.process_index() == 0:
    kept = {'params': state.ema, **state.statistics}
    if frozen is not None:
      kept = with_backbone(frozen, kept)
    if state.memory is not None:
      kept['memory'] = state.memory._asdict()
    save_weights(directory / 'weights', host_copy(kept), step=experiment.steps)
  _wait_for_all('weights')
  return load_run(directory, given)


def _prepare(directory: Path, experiment: Experiment) -> None:
  """Begins a run directory, or checks that it holds this experiment's run."""
  configuration = configuration_hash(experiment)
  if (directory / 'run.json').exists():
    found = read_record(directory)['configuration']
    if found != configuration:
      raise InputError(
        f'{directory} holds a run of another configuration ({found[:12]}, '
        f'not {configuration[:12]}); choose another directory or remove it'
      )
    return
  if any(
    path.name not in ('experiment.py', LOCK) and '.partial-' not in path.name
    for path in (directory.iterdir() if directory.exists() else ())
  ):
    raise InputError(
      f'{directory} is not empty and holds no run; choose another directory'
    )
  _wait_for_all('prepare')
  directory.mkdir(parents=True, exist_ok=True)


def _note(
  directory: Path,
  experiment: Experiment,
  state: TrainState,
  splits: Splits,
  frozen: Frozen | None,
) -> None:
  """Writes the experiment file's copy and `run.json`, once."""
  backbone = None if frozen is None else frozen.digest
  if (directory / 'run.json').exists():
    begun_with = read_record(directory).get('frozen_backbone')
    refuse_other_backbone(experiment, begun_with, backbone, directory)
    return
  origin, source = experiment.origin, None
  if origin is not None:
    source = origin.source
    file = split_source(source)[0]
    if Path(file).is_file():
      shutil.copyfile(file, directory / 'experiment.py')
      source = elsewhere(source, 'experiment.py')
  record = {
    'name': experiment.name,
    'seed': experiment.seed,
    'source': source,
    'overrides': list(origin.overrides) if origin else [],
    'configuration': configuration_hash(experiment),
    'parameters': parameter_count(state.params),
    'frozen_backbone': backbone,
    'train_images': len(splits.train),
    'train_classes': len(splits.train.class_names),
    'environment': environment(),
  }
  write_json(directory / 'run.json', record)


def _wait_for_all(what: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
