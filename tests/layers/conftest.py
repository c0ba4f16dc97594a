"""Fixtures of the tests of several layers."""

import pytest

from msba_jax.layers import block_plan


@pytest.fixture(params=['as it is', 'many steps', 'kernels and steps'])
def steps(request, monkeypatch):
  """Blocks in large steps, in small ones, and in kernels that few fit into."""
  if request.param != 'as it is':
    monkeypatch.setattr(block_plan, 'STEP', (4, 3))
    monkeypatch.setattr(block_plan, 'KERNEL_ROWS', 1)
    monkeypatch.setattr(block_plan, 'KERNEL_QUERIES', 12)
    scores = 0 if request.param == 'many steps' else 24
    monkeypatch.setattr(block_plan, 'KERNEL_SCORES', scores)
