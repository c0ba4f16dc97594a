import dataclasses
import textwrap

import flax.linen as nn
import pytest

from msba_jax.data.errors import InputError
from msba_jax.losses.term import LossTerm
from msba_jax.training.experiment import ContextDropout, Experiment
from msba_jax.training.load import load_experiment

FILE = """
import dataclasses

import flax.linen as nn

from msba_jax.losses.term import LossTerm
from msba_jax.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Photos:
  path: str = 'photos'
  size: int = 32

  def open(self):
    raise NotImplementedError


def first(out, batch):
  return out['solo'].mean()


def experiment():
  return Experiment(
    name='tried',
    model=nn.Dense(3),
    losses=(LossTerm('first', 1.0, first),),
    data=Photos(),
  )
"""


@pytest.fixture
def path(tmp_path):
  path = tmp_path / 'tried.py'
  path.write_text(FILE)
  return path


def test_a_file_is_loaded(path):
  made = load_experiment(path)
  assert made.name == 'tried'
  assert made.batch_size == 64
  assert made.origin.source == str(path)
  assert made.origin.overrides == ()


def test_overrides_reach_nested_fields(path):
  words = ['--steps', '700', '--optimizer.learning-rate', '0.5']
  words += ['--data.path', 'elsewhere', '--context-dropout.solo', '0.1']
  made = load_experiment(path, words)
  assert made.steps == 700
  assert made.optimizer.learning_rate == 0.5
  assert made.data.path == 'elsewhere'
  assert made.data.size == 32
  assert made.context_dropout == ContextDropout(solo=0.1, memory=0.3)
  assert made.origin.overrides == tuple(words)


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    (['--step', '7'], '--step'),
    (['--steps', 'many'], "--steps: .*'many'"),
    (['--steps'], '--steps'),
    (['--steps', '0'], 'steps=0 must be at least 1'),
    (['--optimizer.schedule', 'linear'], 'linear'),
    (['--model', 'x'], '--model'),
    (['--augment', 'None'], '--augment'),
    (['--evaluation.metric', 'beauty'], 'beauty'),
    (['stray'], 'stray'),
    (['--context-dropout.solo', '0.9'], 'solo=0.9'),
  ],
)
def test_a_wrong_override_is_one_sentence(path, words, said):
  with pytest.raises(InputError, match=said) as caught:
    load_experiment(path, words)
  assert 'tried.py' in str(caught.value)
  assert '\n' not in str(caught.value)
  assert not set('─│╭╰') & set(str(caught.value))


def test_help_lists_fields_that_can_be_overridden(path, capsys):
  with pytest.raises(SystemExit) as stopped:
    load_experiment(path, ['--help'])
  assert stopped.value.code == 0
  printed = capsys.readouterr().out
  assert '--data.path' in printed
  assert '--optimizer.learning-rate' in printed
  for hidden in ('--model', '--losses', '--augment', '--origin', '--mean'):
    assert hidden not in printed


def test_a_missing_file(tmp_path):
  with pytest.raises(InputError, match=r'nothing\.py does not exist'):
    load_experiment(tmp_path / 'nothing.py')


def test_a_missing_module():
  with pytest.raises(InputError, match='no_such_module: no such file'):
    load_experiment('no_such_module')


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('x = 1', r'defines no function experiment\(\)'),
    ('def experiment():\n  return 3', 'returned int'),
    ('def experiment(:\n', 'line 1'),
  ],
)
def test_a_file_that_is_no_experiment(tmp_path, text, said):
  path = tmp_path / 'wrong.py'
  path.write_text(text)
  with pytest.raises(InputError, match=said):
    load_experiment(path)


def test_an_error_inside_the_file_is_not_hidden(tmp_path):
  path = tmp_path / 'wrong.py'
  path.write_text(textwrap.dedent('import no_such_package\n'))
  with pytest.raises(ModuleNotFoundError, match='no_such_package'):
    load_experiment(path)


@pytest.mark.parametrize(
  ('field', 'value'),
  [('steps', 0), ('seed', -1), ('ema_decay', 1.0), ('log_every', 0)],
)
def test_impossible_numbers_are_refused(field, value):
  made = Experiment(
    name='x',
    model=nn.Dense(3),
    losses=(LossTerm('zero', 1.0, lambda out, batch: out['solo']),),
    data=None,
  )
  with pytest.raises(ValueError, match=f'{field}={value}'):
    dataclasses.replace(made, **{field: value})
