"""From an experiment file to an experiment.

An experiment file is a Python file with a function `experiment()` that returns
an `Experiment`. Where the function takes an argument, `FILE:VARIANT` calls
`experiment('VARIANT')`, so that one file holds what differs in a word.
Numbers, names and the fields of the data configuration can be overridden on the
command line (`--steps 100 --data.path photos`); the model, the losses and the
augmentation are Python objects and change in the file.

Attributes:
  FILE_MODULE: begins the module name of a loaded file.
  split_source: the file and the variant of `FILE:VARIANT`.
  elsewhere: names the same variant of a copy of the file.
  load_experiment: imports a file and applies overrides.
  load_experiments: several, which their names tell apart.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import tyro

from msba_jax.data.errors import InputError
from msba_jax.training.experiment import Experiment, Origin

FILE_MODULE = 'msba_experiment_'


def load_experiment(
  source: str | Path, overrides: Sequence[str] = ()
) -> Experiment:
  """Imports an experiment file and applies the command line's overrides.

  Args:
    source: path of a Python file, or the dotted name of a module, and
      `:VARIANT` behind it where its function takes one.
    overrides: command-line words, such as `['--steps', '100']`.

  Returns:
    The experiment, with its origin noted.

  Raises:
    InputError: the file is missing, does not define `experiment()`, has no
      such variant, or an override does not fit.
    SystemExit: the overrides ask for `--help`.
  """
  path, variant = split_source(str(source))
  make = getattr(_import(path), 'experiment', None)
  if not callable(make):
    raise InputError(
      f'{path} defines no function experiment(); add one that returns an '
      'Experiment'
    )
  made = _make(make, path, variant)
  if not isinstance(made, Experiment):
    raise InputError(
      f'experiment() in {source} returned {type(made).__name__}; it must '
      'return an Experiment'
    )
  made = _override(made, source=str(source), overrides=overrides)
  origin = Origin(source=str(source), overrides=tuple(overrides))
  return dataclasses.replace(made, origin=origin)


def load_experiments(
  sources: Sequence[str], overrides: Sequence[str] = (), *, seed: int
) -> list[Experiment]:
  """Imports experiments that stand beside each other, all with one seed.

  Args:
    sources: as `load_experiment` takes them.
    overrides: of every experiment.
    seed: of every experiment.

  Returns:
    The experiments, in order.

  Raises:
    InputError: as `load_experiment`; or two have the same name.
  """
  overrides = [*overrides, '--seed', str(seed)]
  first: dict[str, str] = {}
  loaded = [load_experiment(source, overrides) for source in sources]
  for source, experiment in zip(sources, loaded, strict=True):
    name = experiment.name
    if name in first:
      raise InputError(
        f'{first[name]} and {source} are both named {name!r}: give each '
        'experiment a name of its own'
      )
    first[name] = source
  return loaded


def split_source(source: str) -> tuple[str, str]:
  """The file or module of `FILE:VARIANT`, and the variant, '' for none.

  Example:
    >>> split_source('experiments/fusers.py:concat')
    ('experiments/fusers.py', 'concat')
  """
  path, colon, variant = source.rpartition(':')
  if not colon or '/' in variant or Path(source).exists():
    return source, ''
  return path, variant


def elsewhere(source: str, path: str | Path) -> str:
  """The same variant of a copy of the file.

  Example:
    >>> elsewhere('experiments/fusers.py:concat', 'run/experiment.py')
    'run/experiment.py:concat'
  """
  variant = split_source(source)[1]
  return f'{path}:{variant}' if variant else str(path)


def _make(make: Callable[..., object], path: str, variant: str) -> object:
  """Calls `experiment` with the variant, if it takes one."""
  named = list(inspect.signature(make).parameters.values())
  if not variant and all(p.default is not p.empty for p in named):
    return make()
  if bool(variant) != bool(named):
    raise InputError(
      f'experiment() in {path} takes a variant: give {path}:VARIANT'
      if named
      else f'experiment() in {path} takes no variant: leave out :{variant}'
    )
  try:
    return make(variant)
  except LookupError as error:
    raise InputError(
      f'{path} has no variant {variant!r}: {error.args[0]}'
    ) from error


def _import(source: str) -> ModuleType:
  """The module behind a path or a dotted name."""
  if not source.endswith('.py') and not Path(source).exists():
    try:
      return importlib.import_module(source)
    except ModuleNotFoundError as error:
      if error.name is None or not source.startswith(error.name):
        raise
      raise InputError(
        f'experiment {source}: no such file and no such module; give the '
        'path of a Python file that defines experiment()'
      ) from error
  path = Path(source).resolve()
  if not path.is_file():
    raise InputError(
      f'experiment file {source} does not exist; give the path of a Python '
      'file that defines experiment()'
    )
  digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
  name = FILE_MODULE + digest
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise InputError(f'experiment file {source} is no Python file (.py)')
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except SyntaxError as error:
    raise InputError(
      f'experiment file {source}, line {error.lineno}: {error.msg}; correct '
      'the syntax'
    ) from error
  return module


def _override(
  experiment: Experiment, *, source: str, overrides: Sequence[str]
) -> Experiment:
  """Applies overrides; tyro's complaint becomes one sentence."""
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      return tyro.cli(
        Experiment,
        default=experiment,
        args=list(overrides),
        prog=source,
        description='Fields of the experiment that can be overridden.',
      )
  except SystemExit as stop:
    if not stop.code:
      raise
    complaint = ' '.join(_complaint(said.getvalue()).split())
    raise InputError(
      f'override of {source}: {complaint.rstrip(".")}; see --help for its '
      'fields'
    ) from None
  except ValueError as error:
    raise InputError(f'override of {source}: {error}') from error


def _complaint(text: str) -> str:
  """The first paragraph of tyro's framed message, without its frame.

  A frame is drawn with Unicode around its title, or with ASCII below it.
  """
  paragraphs = [['']]
  for line in text.splitlines():
    line = line.strip('│| ')
    if line.startswith('╭') or not line.strip('─-'):
      paragraphs.append([])
    else:
      paragraphs[-1].append(line)
  said = [' '.join(lines) for lines in paragraphs if any(lines)]
  return said[0] if '╭' in text or len(said) == 1 else said[1]
