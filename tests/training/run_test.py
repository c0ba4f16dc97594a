import dataclasses
import json
import shutil

import flax.linen as nn
import numpy as np
import pytest

from msba_jax.data.errors import InputError
from msba_jax.losses import normalized_softmax, solo_losses
from msba_jax.models.context import solo
from msba_jax.retrieval.embed import embed
from msba_jax.training.loop import train
from msba_jax.training.record import read_metrics
from msba_jax.training.run import (
  available_modes,
  evaluate_run,
  load_run,
  read_record,
  run_directory,
)
from tests.training.small_experiment import DrawnData, Tiny


def test_what_a_run_directory_holds(small_run):
  names = {path.name for path in small_run.directory.iterdir()}
  assert names >= {
    'experiment.py',
    'run.json',
    'metrics.jsonl',
    'tensorboard',
    'checkpoints',
    'weights',
  }
  record = read_record(small_run.directory)
  assert record['name'] == 'small'
  assert record['overrides'] == ['--evaluate-every', '3']
  # project (4·4·3 → 8, on 16 blocks), mix, embed
  assert record['parameters'] == 48 * 8 + 8 + 64 + 64 + 8
  assert record['environment']['versions']['jax']


def test_a_run_is_loaded_from_its_own_directory(small_run, tmp_path):
  moved = tmp_path / 'elsewhere'
  shutil.copytree(small_run.directory, moved)
  run = load_run(moved)
  assert run.experiment.steps == 6
  assert run.fingerprint == small_run.fingerprint
  assert len(run.fingerprint) == 64
  np.testing.assert_array_equal(run.memory.valid, True)


def test_the_log_has_training_and_validation(small_run):
  rows = read_metrics(small_run.directory)
  assert [(r['step'], r['phase']) for r in rows] == [
    (2, 'train'),
    (3, 'validation'),
    (4, 'train'),
    (6, 'train'),
    (6, 'validation'),
  ]
  assert {'loss', 'metric_solo', 'gradient_norm', 'averaged_steps'} <= set(
    rows[0]
  )
  assert {'images_per_second', 'data_wait'} <= set(rows[0])
  assert 'map@r' in rows[1]


def test_every_mode_is_scored(small_run, tmp_path):
  directory = tmp_path / 'run'
  shutil.copytree(small_run.directory, directory)
  run = load_run(directory)
  assert available_modes(run) == (
    'solo',
    'neighbours',
    'memory',
    'refinement',
  )
  result = evaluate_run(run, progress=False)
  assert set(result.scores) == set(available_modes(run))
  for mode, scores in result.per_query.items():
    assert scores['recall@1'].shape == (48,)
    np.testing.assert_allclose(
      result.scores[mode]['map@r'], scores['map@r'].mean(), rtol=1e-5
    )
  assert 0 < result.batch_sensitivity < 2
  assert result.ids[:2] == ('1/0', '1/1')
  assert result.scores['solo'] != result.scores['neighbours']
  in_training = read_metrics(directory)[-1]
  assert result.scores['solo']['map@r'] == pytest.approx(in_training['map@r'])

  evaluate_run(run, split='test', modes=('solo',), progress=False)
  noted = json.loads((directory / 'evaluation.json').read_text())
  assert set(noted) == {'validation', 'test'}
  assert noted['validation']['queries'] == 48
  assert noted['validation']['scores'] == result.scores


def test_a_gallery_of_its_own_is_searched(small_run, tmp_path):
  data = dataclasses.replace(small_run.experiment.data, gallery=True)
  run = dataclasses.replace(
    small_run,
    directory=tmp_path,
    experiment=dataclasses.replace(small_run.experiment, data=data),
  )
  result = evaluate_run(
    run, split='test', modes=('solo', 'neighbours'), progress=False
  )
  assert result.per_query['neighbours']['ap'].shape == (48,)


def test_an_unfinished_run_is_not_loaded(small_run, tmp_path):
  directory = tmp_path / 'run'
  shutil.copytree(small_run.directory, directory)
  shutil.rmtree(directory / 'weights')
  with pytest.raises(InputError, match='is not finished'):
    load_run(directory)


def test_no_run_is_no_run(tmp_path):
  with pytest.raises(InputError, match='holds no run'):
    load_run(tmp_path)
  (tmp_path / 'run.json').write_text('{')
  with pytest.raises(InputError, match='is unreadable'):
    load_run(tmp_path)


def test_a_changed_experiment_file_is_noticed(small_run, tmp_path):
  directory = tmp_path / 'run'
  shutil.copytree(small_run.directory, directory)
  path = directory / 'experiment.py'
  path.write_text(path.read_text().replace('padding=2', 'padding=3'))
  with pytest.raises(InputError, match='was trained with configuration'):
    load_run(directory)


def test_a_mode_without_its_memory_is_refused(small_run):
  run = dataclasses.replace(small_run, memory=None)
  assert 'memory' not in available_modes(run)
  with pytest.raises(InputError, match='has no memory'):
    evaluate_run(run, modes=('memory',), progress=False)


def test_where_runs_lie(small):
  found = run_directory('runs', small(seed=3))
  assert found.parts == ('runs', 'small', 'seed3')


class Classifying(Tiny):
  """The small model with one proxy a class."""

  def setup(self):
    super().setup()
    self.proxies = self.param('proxies', nn.initializers.normal(1.0), (6, 8))

  def refine(self, regions, *, context=solo):
    embeddings, out = super().refine(regions, context=context)
    return embeddings, out | {'proxies': self.proxies}


def test_images_of_trained_classes_are_classified(small, tmp_path):
  experiment = small(
    model=Classifying(),
    losses=solo_losses(normalized_softmax),
    data=DrawnData(seen=True),
    steps=40,
    origin=None,
  )
  run = train(experiment, tmp_path / 'run', progress=False)
  result = evaluate_run(
    run, split='seen', modes=('solo', 'refinement'), progress=False
  )
  assert set(result.scores) == {'solo', 'refinement', 'classifier'}
  queries = experiment.data.open().seen.queries
  vectors = embed(run.embedder, queries, progress=False).vectors
  proxies = run.params['proxies']
  cosines = vectors @ (proxies / np.linalg.norm(proxies, axis=1)[:, None]).T
  np.testing.assert_array_equal(
    result.per_query['classifier']['recall@1'],
    np.argmax(cosines, axis=1) == queries.labels,
  )
  assert result.scores['classifier']['recall@1'] > 2 / 6
  others = evaluate_run(run, modes=('solo',), progress=False)
  assert set(others.scores) == {'solo'}


def test_without_held_out_images_nothing_is_classified(small_run):
  with pytest.raises(InputError, match=r'--data\.held-out-images'):
    evaluate_run(small_run, split='seen', progress=False)
