import pytest

from msba_jax.data.errors import InputError
from msba_jax.training.distributed import distributed_settings, initialize

EXPLICIT = {
  'JAX_COORDINATOR_ADDRESS': 'host:1234',
  'JAX_NUM_PROCESSES': '4',
  'JAX_PROCESS_ID': '3',
}


@pytest.mark.parametrize(
  'environment',
  [
    {},
    {'SLURM_STEP_NUM_TASKS': '1'},
    {'OMPI_COMM_WORLD_SIZE': '1'},
    {'TPU_WORKER_HOSTNAMES': 'localhost'},
    {**EXPLICIT, 'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0'},
  ],
)
def test_one_process_is_left_alone(environment):
  assert distributed_settings(environment) is None
  assert initialize(environment) is False


def test_explicit_settings():
  assert distributed_settings(EXPLICIT) == {
    'coordinator_address': 'host:1234',
    'num_processes': 4,
    'process_id': 3,
  }


@pytest.mark.parametrize(
  'environment',
  [
    {'SLURM_STEP_NUM_TASKS': '2'},
    {'OMPI_COMM_WORLD_SIZE': '8'},
    {'TPU_WORKER_HOSTNAMES': 'a,b'},
  ],
)
def test_a_cluster_is_left_to_jax(environment):
  assert distributed_settings(environment) == {}


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'JAX_PROCESS_ID': ''}, 'JAX_PROCESS_ID is not'),
    ({'JAX_PROCESS_ID': '4'}, 'JAX_PROCESS_ID=4 must be in 0..3'),
    ({'JAX_NUM_PROCESSES': 'four'}, "JAX_NUM_PROCESSES='four' must be"),
  ],
)
def test_half_a_configuration_is_refused(change, said):
  with pytest.raises(InputError, match=said):
    distributed_settings({**EXPLICIT, **change})
