import dataclasses
import re
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest

from msba_jax.data.errors import InputError
from msba_jax.data.source import Evaluation, Splits
from msba_jax.losses import solo_losses, supervised_contrastive
from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.context import solo
from msba_jax.models.controls import BackboneOnly
from msba_jax.models.fusion_baselines import ConcatFuser
from msba_jax.models.mmfuser import FusedBackbone
from msba_jax.training.compare import Comparison, compare
from msba_jax.training.configuration import configuration_hash
from msba_jax.training.frozen import freeze, standing_digest
from msba_jax.training.load import load_experiment, load_experiments
from msba_jax.training.loop import train
from msba_jax.training.results import (
  Outcome,
  outcome_path,
  scores_sha256,
  write_outcome,
)
from msba_jax.training.run import load_run, read_record
from tests.training.conftest import SMALL


class Named:
  """A source that can say what its pictures depend on."""

  def __init__(self, source, name):
    self._source, self._name = source, name
    self.labels, self.ids = source.labels, source.ids
    self.class_names = source.class_names

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    return self._source[index]

  def fingerprint(self):
    return self._name


@dataclasses.dataclass(frozen=True)
class NamedData:
  """The small experiment's images, with fingerprints."""

  inner: object
  size: int = 16

  def open(self):
    splits = self.inner.open()
    return Splits(
      Named(splits.train, 'train'),
      Evaluation(Named(splits.validation.queries, 'validation'), None),
      splits.test,
    )


class Running(ConvNet):
  """The net behind batch normalisation with running statistics."""

  @nn.compact
  def __call__(self, images, *, train=False):
    images = nn.BatchNorm(not train, name='input')(images)
    return super().__call__(images, train=train)


class Coarse(Running):
  """The coarsest grid alone."""

  @nn.compact
  def __call__(self, images, *, train=False):
    return super().__call__(images, train=train)[-1:]


def make_experiment(**changes):
  base = load_experiment(SMALL)
  return dataclasses.replace(
    base,
    model=BackboneOnly(
      Running(ConvSpec((4, 6), (1, 1), levels=2)),
      features=4, hidden=4, embedding=4,
    ),
    losses=solo_losses(supervised_contrastive),
    data=NamedData(base.data),
    evaluate_every=3,
    origin=None,
    **changes,
  )  # fmt: skip


@pytest.fixture(scope='module')
def backbone_run(tmp_path_factory):
  directory = tmp_path_factory.mktemp('frozen') / 'backbone'
  return train(
    make_experiment(), directory, devices=jax.devices()[:1], progress=False
  )


@pytest.fixture(scope='module')
def head(backbone_run):
  """An experiment on the frozen backbone, and its finished run."""
  experiment = make_experiment(
    frozen_backbone=str(backbone_run.directory), frozen_views=2, seed=1
  )
  directory = backbone_run.directory.with_name('head')
  run = train(experiment, directory, devices=jax.devices()[:1], progress=False)
  return experiment, run


def test_the_backbone_is_left_alone_and_the_head_is_trained(backbone_run, head):
  _, run = head
  before, after = backbone_run.params, run.params
  statistics = backbone_run.statistics['batch_stats']['backbone']['input']
  assert np.all(statistics['mean'] != 0)
  for a, b in zip(
    jax.tree.leaves((before['backbone'], backbone_run.statistics)),
    jax.tree.leaves((after['backbone'], run.statistics)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  moved = np.abs(before['embed']['kernel'] - after['embed']['kernel'])
  assert moved.max() > 1e-4
  record = read_record(run.directory)
  whole = read_record(backbone_run.directory)['parameters']
  frozen = sum(x.size for x in jax.tree.leaves(before['backbone']))
  assert record['parameters'] == whole - frozen
  assert len(record['frozen_backbone']) == 64


def test_the_run_embeds_images_as_it_embeds_their_grids(head):
  experiment, run = head
  splits = experiment.data.open()
  frozen = freeze(experiment, splits, progress=False)
  grids = frozen.splits.train
  assert len(grids) == 2 * len(splits.train)
  np.testing.assert_array_equal(
    grids.labels[: len(splits.train)], splits.train.labels
  )
  picture = splits.train[5]['image'][None]
  plain = tuple(x[None] for x in grids[5]['image'])
  changed = tuple(x[None] for x in grids[len(splits.train) + 5]['image'])
  assert any(np.any(a != b) for a, b in zip(plain, changed, strict=True))
  expected, _ = run.embedder.compiled(
    run.embedder.variables, picture, solo, False
  )
  heads = {k: v for k, v in run.params.items() if k != 'backbone'}
  apply = jax.jit(frozen.experiment.model.apply)
  found, _ = apply({'params': heads}, plain)
  # The grids are kept in half precision.
  np.testing.assert_allclose(found, expected, atol=5e-3)


def test_grids_are_computed_once(head, monkeypatch):
  experiment, _ = head
  monkeypatch.setattr(
    'msba_jax.training.frozen._write', lambda *_: pytest.fail('again')
  )
  freeze(experiment, experiment.data.open(), progress=False)


def test_the_same_command_goes_on_and_another_backbone_is_refused(
  head, backbone_run, tmp_path
):
  experiment, run = head
  again = train(experiment, run.directory, progress=False)
  assert again.fingerprint == run.fingerprint
  assert load_run(run.directory, experiment).fingerprint == run.fingerprint
  missing = dataclasses.replace(experiment, frozen_backbone=str(tmp_path))
  with pytest.raises(InputError, match='holds neither a finished run'):
    train(missing, tmp_path / 'new', progress=False)
  wider = experiment.model.clone(
    backbone=Running(ConvSpec((4, 8), (1, 1), levels=2))
  )
  with pytest.raises(InputError, match='has another backbone'):
    train(
      dataclasses.replace(experiment, model=wider),
      tmp_path / 'wider',
      progress=False,
    )


def test_a_fuser_of_frozen_grids_is_trained(backbone_run, tmp_path):
  base = make_experiment(frozen_backbone=str(backbone_run.directory))
  fused = FusedBackbone(
    Coarse(ConvSpec((4, 6), (1, 1), levels=2)), ConcatFuser()
  )
  experiment = dataclasses.replace(
    base, model=base.model.clone(backbone=fused), evaluate_every=0
  )
  run = train(
    experiment, tmp_path / 'run', devices=jax.devices()[:1], progress=False
  )
  assert set(run.params['backbone']) == {'backbone', 'fuser'}
  for a, b in zip(
    jax.tree.leaves(
      (backbone_run.params['backbone'], backbone_run.statistics['batch_stats'])
    ),
    jax.tree.leaves((run.params['backbone']['backbone'], run.statistics)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  frozen = freeze(experiment, experiment.data.open(), progress=False)
  heads = run.params | {'backbone': {'fuser': run.params['backbone']['fuser']}}
  picture = experiment.data.open().train[5]['image'][None]
  expected, _ = run.embedder.compiled(
    run.embedder.variables, picture, solo, False
  )
  grids = tuple(x[None] for x in frozen.splits.train[5]['image'])
  found, _ = jax.jit(frozen.experiment.model.apply)({'params': heads}, grids)
  np.testing.assert_allclose(found, expected, atol=5e-3)


def test_a_run_on_a_backbone_that_was_trained_anew_is_refused(
  head, backbone_run, tmp_path
):
  experiment, run = head
  stands, aside = backbone_run.directory / 'weights', tmp_path / 'aside'
  train(make_experiment(seed=5, steps=3), tmp_path / 'anew', progress=False)
  before = standing_digest(experiment)
  assert before == read_record(run.directory)['frozen_backbone']
  assert standing_digest(make_experiment()) is None
  stands.rename(aside)
  try:
    # Weights of the whole model are beside the head: nothing is missing.
    assert standing_digest(experiment) is None
    again = train(experiment, run.directory, progress=False)
    assert again.fingerprint == run.fingerprint
    shutil.copytree(tmp_path / 'anew' / 'weights', stands)
    assert standing_digest(experiment) not in (None, before)
    with pytest.raises(InputError, match='made with another backbone than now'):
      train(experiment, run.directory, progress=False)
  finally:
    shutil.rmtree(stands, ignore_errors=True)
    aside.rename(stands)


@pytest.mark.parametrize('known', [True, False])
def test_a_result_of_a_backbone_that_was_trained_anew_is_refused(
  backbone_run, tmp_path, monkeypatch, known
):
  file = tmp_path / 'frozen_experiment.py'
  file.write_text(
    'from tests.training.frozen_test import make_experiment\n'
    'def experiment():\n'
    '  return make_experiment()\n'
  )
  overrides = ('--frozen-backbone', str(backbone_run.directory))
  comparison = Comparison(
    experiments=(str(file),), seeds=(0,), overrides=overrides, results=tmp_path
  )
  (experiment,) = load_experiments([str(file)], overrides, seed=0)
  path = outcome_path(
    tmp_path,
    experiment=experiment.name,
    configuration=configuration_hash(experiment),
    seed=0,
    split='validation',
  )
  monkeypatch.setattr('msba_jax.training.compare._run', None)
  digest = standing_digest(experiment)
  outcome = Outcome(
    experiment=experiment.name,
    configuration=configuration_hash(experiment),
    seed=0,
    split='validation',
    parameters=1,
    labels=np.arange(2, dtype=np.int32),
    scores={'solo': {'ap': np.arange(2, dtype=np.float32)}},
    record={'frozen_backbone': digest} if known else {},
  )
  write_outcome(path, outcome)
  found = compare(comparison, progress=False)[0][0]
  assert scores_sha256(found) == scores_sha256(outcome)
  write_outcome(path, outcome._replace(record={'frozen_backbone': 64 * '0'}))
  with pytest.raises(InputError, match=re.escape(f'{path} was made with')):
    compare(comparison, progress=False)


def test_a_flipped_bit_in_the_grids_is_found(head, backbone_run):
  experiment, _ = head
  paths = list((backbone_run.directory / 'features').glob('*/level_0.npy'))
  contents = [path.read_bytes() for path in paths]
  for path, content in zip(paths, contents, strict=True):
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with pytest.raises(InputError, match=r'level_0\.npy is not what was written'):
    freeze(experiment, experiment.data.open(), progress=False)
  for path, content in zip(paths, contents, strict=True):
    path.write_bytes(content)
