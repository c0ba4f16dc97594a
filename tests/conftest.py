"""Settings of the whole suite: eight CPU devices, strict shapes and dtypes."""

import os

from jaxlib.version import __version_info__ as version_info

# What needs a GPU runs with JAX_PLATFORMS=cuda and is skipped otherwise.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=8'
  # The suite compiles much and computes little.
  + ' --xla_backend_optimization_level=0'
  + ' --xla_llvm_disable_expensive_passes=true'
  # Newer builds of XLA do not know this option, which saves a third here.
  + ' --xla_cpu_use_fusion_emitters=false' * (version_info < (0, 11))
)

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
hypothesis.settings.register_profile(
  'suite',
  deadline=None,
  max_examples=int(os.environ.get('HYPOTHESIS_EXAMPLES', '10')),
  derandomize=True,
  database=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile('suite')


@pytest.fixture(params=['eager', 'jit'])
def variant(request):
  """Runs a function as it is, and compiled: `variant(function)(...)`."""
  if request.param == 'eager':
    return lambda function, **_: function
  return jax.jit


@pytest.fixture
def rng():
  """A NumPy generator with a fixed seed."""
  return np.random.default_rng(0)


@pytest.fixture
def unchecked():
  """Annotations off, as for a user: our own error messages are seen."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)
