"""Tests of `msba_jax.training.stop`."""

import signal

import pytest

from msba_jax.training.stop import StopRequest


@pytest.fixture
def interruptible():
  """The handler that a program begins with, whatever the suite has."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_nothing_is_asked():
  with StopRequest() as stop:
    assert not stop.requested(1)


def test_sigterm_asks_to_stop_after_the_step():
  before = signal.getsignal(signal.SIGTERM)
  with StopRequest() as stop:
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested(1)
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures('interruptible')
def test_sigint_interrupts_after_the_step_and_the_second_at_once():
  with StopRequest() as stop:
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      stop.requested(1)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_sigint_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with StopRequest() as stop:
      signal.raise_signal(signal.SIGINT)
      assert not stop.requested(1)
  finally:
    signal.signal(signal.SIGINT, before)
