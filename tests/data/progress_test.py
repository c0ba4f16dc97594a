import sys

import pytest

from msba_jax.data.progress import progress_bar


def shown(capsys):
  with progress_bar(1000, desc='count', unit='thing') as bar:
    for _ in range(1000):
      bar.update()
  return capsys.readouterr().err


def test_a_log_gets_the_begin_and_the_end(capsys):
  text = shown(capsys)
  assert 'count: 100%' in text
  assert '1000/1000' in text
  assert text.count('\r') <= 3


def test_a_terminal_sees_it_move(monkeypatch):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
  with progress_bar(1, desc='count', unit='thing', disable=False) as bar:
    assert bar.mininterval < 1


@pytest.mark.parametrize('disable', [True, False])
def test_it_is_silent_where_nobody_asked(capsys, disable):
  with progress_bar(2, desc='count', unit='thing', disable=disable) as bar:
    bar.update(2)
  assert bool(capsys.readouterr().err) is not disable
