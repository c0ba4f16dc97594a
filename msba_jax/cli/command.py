"""Runs a subcommand: parses its flags, turns errors into exit codes.

Attributes:
  run_command: parses, runs, and says in one sentence what went wrong.
  parse: arguments to options.
"""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import tyro


def run_command(name: str, module: ModuleType, arguments: Sequence[str]) -> int:
  """Runs one subcommand.

  Args:
    name: of the command, for messages.
    module: has `Options` (a frozen dataclass), `run`, `EXAMPLES` and
      `INTERRUPTED` (what stays after an interruption, one sentence). With
      `TAKES_OVERRIDES` true, `run` gets what `Options` does not know as its
      second argument.
    arguments: what stands after the name of the command.

  Returns:
    The exit code: see `msba_jax.cli`.
  """
  try:
    options, rest = parse(name, module, arguments)
  except SystemExit as stop:
    return stop.code if isinstance(stop.code, int) else 2
  # Both are imported after --help, which they would slow down.
  from msba_jax.data.errors import InputError
  from msba_jax.training.errors import NonFiniteLossError

  try:
    if rest is None:
      return module.run(options)
    return module.run(options, rest)
  except SystemExit as stop:  # an experiment was asked for its fields
    return stop.code if isinstance(stop.code, int) else 2
  except InputError as error:
    print(f'msba {name}: {error}', file=sys.stderr)
    return 2
  except NonFiniteLossError as error:
    print(f'msba {name}: {error}', file=sys.stderr)
    return 3
  except KeyboardInterrupt as stop:
    text = str(stop) or f'interrupted. {module.INTERRUPTED}'
    print(f'\nmsba {name}: {text}', file=sys.stderr)
    return 130


def parse(
  name: str, module: ModuleType, arguments: Sequence[str]
) -> tuple[Any, list[str] | None]:
  """Options, and what is left over for a command that takes overrides.

  Args:
    name: of the command.
    module: see `run_command`.
    arguments: what stands after the name of the command.

  Returns:
    An instance of `module.Options`; the other arguments, or None if the
    command takes no overrides.

  Raises:
    SystemExit: help was asked for, or the arguments do not fit.
  """
  purpose = (module.__doc__ or '').partition('\n\nAttributes:')[0].strip()
  arguments = list(arguments)
  program = f'msba {name}'
  description = f'{purpose}\n\nexamples:\n{module.EXAMPLES}'
  if not getattr(module, 'TAKES_OVERRIDES', False):
    options = tyro.cli(
      module.Options, args=arguments, prog=program, description=description
    )
    return options, None
  return tyro.cli(
    module.Options,
    args=arguments,
    prog=program,
    description=description,
    return_unknown_args=True,
  )
