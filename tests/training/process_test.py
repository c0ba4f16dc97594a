"""Training in processes of its own: killed, and several at once."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from msba_jax.training.record import read_metrics

SMALL = str(Path(__file__).with_name('small_experiment.py'))
TRAIN = """
import sys
from msba_jax.training.distributed import initialize
initialize()
from msba_jax.training.load import load_experiment
from msba_jax.training.loop import train
file, directories, *overrides = sys.argv[1:]
for directory in directories.split(','):
  train(load_experiment(file, overrides), directory, progress=False)
"""

pytestmark = pytest.mark.slow


def _start(directories, *overrides, devices=1, **environment):
  flags = (
    f'--xla_force_host_platform_device_count={devices} '
    '--xla_backend_optimization_level=0'
  )
  names = ','.join(str(directory) for directory in directories)
  return subprocess.Popen(
    [sys.executable, '-c', TRAIN, SMALL, names, *overrides],
    env={**os.environ, 'XLA_FLAGS': flags, **environment},
    stderr=subprocess.PIPE,
    text=True,
  )


def _finish(process):
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors[-3000:]


def test_kill_and_the_same_command_again(tmp_path):
  overrides = ('--steps', '200', '--checkpoint-every', '5')
  killed, whole = tmp_path / 'killed', tmp_path / 'whole'
  process = _start([killed], *overrides)
  deadline = time.monotonic() + 100
  while not list(killed.glob('checkpoints/*/manifest.json')):
    assert process.poll() is None, process.communicate()[1][-3000:]
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert not (killed / 'weights').exists()
  _finish(_start([killed, whole], *overrides))
  with (
    np.load(killed / 'weights' / 'arrays.npz') as found,
    np.load(whole / 'weights' / 'arrays.npz') as expected,
  ):
    assert set(found) == set(expected)
    for name in expected:
      assert found[name].tobytes() == expected[name].tobytes(), name
  steps = [row['step'] for row in read_metrics(killed)]
  assert steps == list(range(2, 201, 2))


def test_two_processes_are_one(small_run, tmp_path):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  processes = [
    _start(
      [tmp_path / 'run'],
      '--evaluate-every',
      '3',
      devices=2,
      JAX_COORDINATOR_ADDRESS=f'localhost:{port}',
      JAX_NUM_PROCESSES='2',
      JAX_PROCESS_ID=str(i),
    )
    for i in range(2)
  ]
  for process in processes:
    _finish(process)
  rows, expected = (
    read_metrics(directory)
    for directory in (tmp_path / 'run', small_run.directory)
  )
  assert [(r['step'], r['phase']) for r in rows] == [
    (r['step'], r['phase']) for r in expected
  ]
  for row, other in zip(rows, expected, strict=True):
    if row['phase'] == 'train':
      # Adam divides by roots of tiny squares: rounding grows with the steps.
      close = 1e-5 if row['step'] == 2 else 2e-4
      for name in ('loss', 'gradient_norm'):
        assert row[name] == pytest.approx(other[name], rel=close)
    else:
      assert row['map@r'] == pytest.approx(other['map@r'], abs=1e-6)
