"""Tests of `msba_jax.cli`: help, errors and exit codes."""

import dataclasses
import subprocess
import sys
import time
import types

import pytest

from msba_jax import __version__, cli
from msba_jax.cli.command import run_command
from msba_jax.data.errors import InputError
from msba_jax.training.errors import NonFiniteLossError, TrainingStopped


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags of a command that fails as it is told."""

  steps: int = 1
  """How many."""


def command(fail, **attributes):
  """A command's module whose `run` raises."""

  def run(*arguments):
    del arguments
    raise fail

  module = types.ModuleType('fail', 'Fails.\n\nAttributes:\n  run: fails.')
  vars(module).update(
    Options=Options,
    EXAMPLES='  msba fail --steps 2\n',
    INTERRUPTED='Three files stay.',
    run=run,
    **attributes,
  )
  return module


@pytest.mark.parametrize('arguments', [[], ['--help'], ['-h'], ['help']])
def test_the_overview_names_every_command(capsys, arguments):
  assert cli.main(arguments) == 0
  text = capsys.readouterr().out
  for name, purpose in cli.COMMANDS.items():
    assert f'{name:<16}{purpose}' in text


def test_the_overview_needs_no_jax_and_no_time():
  code = (
    'import sys; from msba_jax.cli import main; main(["--help"]); '
    'assert not {"jax", "numpy", "tyro"} & set(sys.modules)'
  )
  started = time.monotonic()
  done = subprocess.run([sys.executable, '-c', code], check=False)
  assert done.returncode == 0
  assert time.monotonic() - started < 2


def test_version(capsys):
  assert cli.main(['--version']) == 0
  assert capsys.readouterr().out == f'msba {__version__}\n'


def test_an_unknown_command_is_named_with_a_close_one(capsys):
  assert cli.main(['serch']) == 2
  assert 'did you mean `msba search`?' in capsys.readouterr().err
  assert cli.main(['xyz']) == 2
  assert "no command 'xyz'; see `msba --help`" in capsys.readouterr().err


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_help_of_a_command_has_flags_and_examples(capsys, name):
  assert cli.main([name, '--help']) == 0
  text = capsys.readouterr().out
  module = cli.command_module(name)
  assert f'usage: msba {name}' in text
  assert 'Attributes:' not in text
  for line in module.EXAMPLES.splitlines():
    assert line.strip() in text
  usage = text.partition('\n\n')[0]
  for field in dataclasses.fields(module.Options):
    assert (
      f'--{field.name.replace("_", "-")}' in text
      or field.name.upper() in usage
      or (field.name == 'k' and '-k' in text)
      or name in ('doctor', 'compare')  # those take lists
    )
  assert module.INTERRUPTED.endswith('.')


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_examples_parse(name):
  module = cli.command_module(name)
  text = module.EXAMPLES.replace('\\\n', ' ')
  from msba_jax.cli.command import parse

  for line in text.splitlines():
    words = line.split('   ')[0].split()
    while words[0] != 'msba':  # VARIABLE=value
      words = words[1:]
    assert words[:2] == ['msba', name]
    options, _ = parse(name, module, words[2:])
    assert isinstance(options, module.Options)


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_a_flag_that_does_not_exist_is_refused(capsys, name):
  module = cli.command_module(name)
  if getattr(module, 'TAKES_OVERRIDES', False):
    pytest.skip('what it does not know are overrides')
  first = module.EXAMPLES.replace('\\\n', ' ').splitlines()[0].split()[2:]
  assert cli.main([name, *first, '--no-such-flag']) == 2
  assert '--no-such-flag' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('fail', 'code', 'text'),
  [
    (InputError('photo.jpg is broken: replace it'), 2, 'photo.jpg is broken'),
    (
      NonFiniteLossError(
        7, indices=[3, 1], ids=['a', 'b'], values={'loss': float('nan')}
      ),
      3,
      '[3, 1]: a, b',
    ),
    (KeyboardInterrupt(), 130, 'Three files stay.'),
    (TrainingStopped(40), 130, 'stopped after step 40'),
  ],
)
@pytest.mark.parametrize('overrides', [False, True])
def test_exit_codes(capsys, fail, code, text, overrides):
  module = command(fail, TAKES_OVERRIDES=overrides)
  assert run_command('fail', module, ['--steps', '3']) == code
  error = capsys.readouterr().err.strip()
  assert text in error
  assert len(error.splitlines()) == 1
  assert error.startswith('msba fail: ')


def test_other_errors_are_ours_and_keep_their_traceback():
  with pytest.raises(ZeroDivisionError):
    run_command('fail', command(ZeroDivisionError()), [])


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['train', 'missing.py'], 'experiment file missing.py does not exist'),
    (['evaluate', 'missing'], 'missing holds no run'),
    (['index', 'missing', 'photos', 'out'], 'missing holds no run'),
    (['search', 'a.jpg', '--index', 'i', '--run', 'missing'], 'holds no run'),
    (['report', 'missing'], 'missing holds no run'),
    (['compare', 'missing.py'], 'experiment file missing.py does not exist'),
  ],
)
def test_what_is_missing_is_named(
  tmp_path, monkeypatch, capsys, arguments, said
):
  monkeypatch.chdir(tmp_path)
  assert cli.main(arguments) == 2
  error = capsys.readouterr().err.strip()
  assert said in error
  assert len(error.splitlines()) == 1
  assert not list(tmp_path.iterdir())


def test_the_console_script_is_there():
  done = subprocess.run(
    [sys.executable, '-m', 'msba_jax', '--version'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout == f'msba {__version__}\n'
