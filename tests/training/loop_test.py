import dataclasses
import os
import shutil
import signal
from typing import get_args

import jax
import numpy as np
import pytest

from msba_jax.data.directory import read_manifest
from msba_jax.data.errors import InputError
from msba_jax.data.source import Splits
from msba_jax.training.errors import NonFiniteLossError, TrainingStopped
from msba_jax.training.experiment import Metric
from msba_jax.training.fit import plan_indices
from msba_jax.training.lock import only_one
from msba_jax.training.loop import train
from msba_jax.training.record import read_metrics
from msba_jax.training.run import evaluate_run


def assert_same_checkpoint(one, other, step):
  """Bit-equal: shapes, dtypes and the hash of every leaf's bytes."""
  found, expected = (_leaves(run, step) for run in (one, other))
  assert found.keys() == expected.keys()
  for name, leaf in found.items():
    assert leaf.dtype == expected[name].dtype
    assert leaf.tobytes() == expected[name].tobytes(), name


def _leaves(directory, step):
  import orbax.checkpoint as ocp

  where = directory / 'checkpoints'
  read_manifest(where / str(step))
  with ocp.CheckpointManager(where) as manager:
    metadata = manager.restore(step, args=ocp.args.PyTreeRestore())
  return {name: np.asarray(leaf) for name, leaf in metadata.items()}


def _log(directory):
  """What was logged, without what depends on the machine."""
  timed = ('images_per_second', 'data_wait')
  return [
    {name: value for name, value in row.items() if name not in timed}
    for row in read_metrics(directory)
  ]


def _train(experiment, directory, **options):
  return train(
    experiment,
    directory,
    devices=jax.devices()[:2],
    progress=False,
    **options,
  )


def test_a_stopped_run_goes_on_as_if_it_had_not(small, small_run, tmp_path):
  experiment = small(evaluate_every=3)
  with pytest.raises(TrainingStopped, match='after step 4') as stopped:
    _train(experiment, tmp_path / 'run', until=4)
  assert stopped.value.step == 4
  shutil.copytree(tmp_path / 'run', tmp_path / 'broken')
  run = _train(experiment, tmp_path / 'run')
  assert_same_checkpoint(run.directory, small_run.directory, 6)
  for a, b in zip(
    jax.tree.leaves((run.params, run.memory)),
    jax.tree.leaves((small_run.params, small_run.memory)),
    strict=True,
  ):
    assert a.tobytes() == b.tobytes()
  assert _log(run.directory) == _log(small_run.directory)

  # A broken newest checkpoint costs a step again, and no bit.
  newest = tmp_path / 'broken' / 'checkpoints' / '4'
  (newest / 'commit_success.txt').write_text('flipped')
  with pytest.warns(UserWarning, match='skipping checkpoint 4'):
    run = _train(experiment, tmp_path / 'broken')
  assert_same_checkpoint(run.directory, small_run.directory, 6)
  steps = [(row['step'], row['phase']) for row in _log(run.directory)]
  assert steps == [(r['step'], r['phase']) for r in _log(small_run.directory)]


def test_a_finished_run_is_returned_without_its_data(small_run):
  @dataclasses.dataclass(frozen=True)
  class Gone:
    def open(self) -> Splits:
      raise AssertionError('a finished run needs no data')

  again = _train(small_run.experiment, small_run.directory)
  assert again.fingerprint == small_run.fingerprint
  with pytest.raises(InputError, match='run of another configuration'):
    _train(
      dataclasses.replace(small_run.experiment, data=Gone()),
      small_run.directory,
    )


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(
  small, tmp_path, monkeypatch
):
  source = small().data.open().train
  plan = plan_indices(small(), source)
  late = next(i for i in range(len(source)) if _first(plan, i) == 3)
  monkeypatch.setenv('SMALL_TRAP', str(late))
  experiment = small(steps=20, checkpoint_every=2)
  with pytest.raises(NonFiniteLossError) as failed:
    _train(experiment, tmp_path / 'run')
  error = failed.value
  assert error.step == 3
  assert error.indices == tuple(plan(3).tolist())
  assert f'0/{late}' in error.ids
  assert np.isnan(error.values['trap'])
  assert np.isfinite(error.values['metric_solo'])
  for part in ('step 3', 'trap nan', str(list(error.indices)), f'0/{late}'):
    assert part in str(error)
  steps = [p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()]
  assert steps == ['2']


def _first(plan, index):
  return next((s for s in range(20) if index in plan(s)), None)


class _Impatient:
  """A training source whose owner asks to stop at its twentieth image."""

  def __init__(self, source):
    self._source, self._read = source, 0
    self.labels, self.ids = source.labels, source.ids
    self.class_names = source.class_names

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    self._read += 1
    if self._read == 20:
      os.kill(os.getpid(), signal.SIGTERM)
    return self._source[index]


@dataclasses.dataclass(frozen=True)
class ImpatientData:
  data: object

  def open(self):
    splits = self.data.open()
    return splits._replace(train=_Impatient(splits.train))


def test_sigterm_saves_and_stops(small, tmp_path):
  experiment = small(data=ImpatientData(small().data), steps=5000)
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(TrainingStopped) as stopped:
    _train(experiment, tmp_path / 'run')
  step = stopped.value.step
  assert 0 < step < 5000
  assert (tmp_path / 'run' / 'checkpoints' / str(step)).is_dir()
  assert signal.getsignal(signal.SIGTERM) is before


def test_a_directory_with_something_else_is_refused(small, tmp_path):
  (tmp_path / 'thesis.tex').write_text('years of work')
  with pytest.raises(InputError, match='is not empty and holds no run'):
    _train(small(), tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_more_classes_than_there_are(small, tmp_path):
  with pytest.raises(InputError, match='classes_per_batch=7 is more than'):
    _train(small(classes_per_batch=7), tmp_path / 'run')


def test_a_directory_that_another_process_trains_in(small, tmp_path):
  with (
    only_one(tmp_path / 'run'),
    pytest.raises(InputError, match='another process trains in'),
  ):
    _train(small(), tmp_path / 'run')


def test_what_an_evaluation_gives_can_be_chosen(small_run):
  scores = evaluate_run(small_run, progress=False).per_query['solo']
  assert set(get_args(Metric)) == set(scores)
