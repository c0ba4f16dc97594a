"""The command `msba`: one module for each subcommand, imported when asked for.

`msba --help` imports nothing but the standard library. A subcommand's module
holds a frozen dataclass `Options`, which tyro turns into flags, a function
`run(options)` that returns the exit code, and the texts `EXAMPLES` and
`INTERRUPTED`.

Exit codes: 0 done; 1 a check of `doctor` failed; 2 the user's input cannot be
used (one sentence on standard error says why); 3 the loss became NaN or
infinite; 130 interrupted.

Attributes:
  COMMANDS: name and purpose of every subcommand.
  command_module: the module of a subcommand.
  main: the console script.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

COMMANDS = {
  'demo': 'train, evaluate, index, search and report on drawn scenes',
  'train': 'train an experiment file; the same command again resumes',
  'evaluate': 'score a trained run on validation or test classes',
  'index': 'embed a collection of images into an index directory',
  'search': 'find the images of an index that look like a given one',
  'report': 'write one HTML page about a trained run',
  'import-weights': 'make weights of a published checkpoint in safetensors',
  'compare': 'several experiments over several seeds, as one table',
  'rank-backbones': 'which backbone to train, of which only a few are trained',
  'doctor': 'devices, versions, disk and memory, with what is wrong',
}

_OVERVIEW = """\
usage: msba COMMAND [arguments]

Image retrieval in JAX in which the images of a batch attend to each other.

commands:
{commands}

examples:
  msba demo
  msba train experiments/scenes_msba.py --steps 500
  msba evaluate runs/scenes_msba/seed0 --split test
  msba index runs/scenes_msba/seed0 photos/ photos.index --regions
  msba search photo.jpg --index photos.index --run runs/scenes_msba/seed0

`msba COMMAND --help` explains a command; `msba --version` prints the version.
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one subcommand and returns its exit code.

  Args:
    arguments: what stands after `msba`; `sys.argv` if None.

  Returns:
    The exit code; see the page of this module.
  """
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  if not arguments or arguments[0] in ('-h', '--help', 'help'):
    print(_overview(), end='')
    return 0
  name, *rest = arguments
  if name == '--version':
    from msba_jax import __version__

    print(f'msba {__version__}')
    return 0
  if name not in COMMANDS:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f'did you mean `msba {close[0]}`?' if close else 'see `msba --help`.'
    print(f'msba: there is no command {name!r}; {hint}', file=sys.stderr)
    return 2
  from msba_jax.cli.command import run_command

  return run_command(name, command_module(name), rest)


def command_module(name: str) -> ModuleType:
  """The module of a subcommand, imported."""
  return importlib.import_module(f'msba_jax.cli.{name.replace("-", "_")}')


def _overview() -> str:
  """The text of `msba --help`."""
  return _OVERVIEW.format(
    commands='\n'.join(f'  {n:<16}{text}' for n, text in COMMANDS.items())
  )
