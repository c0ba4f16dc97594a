import json

import jax
import pytest

from msba_jax.training.record import MetricsLog, environment, read_metrics


def _steps(directory):
  return [(row['step'], row['phase']) for row in read_metrics(directory)]


def test_lines_are_appended(tmp_path):
  with MetricsLog(tmp_path) as log:
    log.write(1, 'train', {'loss': 0.5})
    log.write(1, 'validation', {'recall@1': 0.25})
  assert read_metrics(tmp_path) == [
    {'step': 1, 'phase': 'train', 'loss': 0.5},
    {'step': 1, 'phase': 'validation', 'recall@1': 0.25},
  ]
  assert list((tmp_path / 'tensorboard').glob('events*'))


def test_a_resumed_log_has_no_step_twice(tmp_path):
  with MetricsLog(tmp_path) as log:
    for step in (2, 4, 6):
      log.write(step, 'train', {'loss': 1.0})
  with MetricsLog(tmp_path, step=4) as log:
    log.write(6, 'train', {'loss': 2.0})
  assert _steps(tmp_path) == [(2, 'train'), (4, 'train'), (6, 'train')]
  assert read_metrics(tmp_path)[-1]['loss'] == 2.0


def test_a_run_that_begins_anew_drops_all(tmp_path):
  with MetricsLog(tmp_path) as log:
    log.write(2, 'train', {'loss': 1.0})
  with MetricsLog(tmp_path, step=0):
    pass
  assert read_metrics(tmp_path) == []


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
  with MetricsLog(tmp_path) as log:
    log.write(2, 'train', {'loss': 1.0})
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 3, "ph')
  assert _steps(tmp_path) == [(2, 'train')]
  with MetricsLog(tmp_path, step=3) as log:
    log.write(4, 'train', {'loss': 1.0})
  assert _steps(tmp_path) == [(2, 'train'), (4, 'train')]


def test_no_log_is_no_lines(tmp_path):
  assert read_metrics(tmp_path) == []


@pytest.mark.parametrize('name', ['versions', 'commit', 'devices', 'platform'])
def test_the_environment_is_json(name):
  found = json.loads(json.dumps(environment()))
  assert name in found
  assert found['devices'][1] == jax.device_count()
