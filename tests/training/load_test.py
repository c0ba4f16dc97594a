import textwrap

import pytest

from msba_jax.data.errors import InputError
from msba_jax.training.experiment import ContextDropout
from msba_jax.training.load import elsewhere, load_experiment, split_source

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


VARIANTS = FILE.replace(
  'def experiment():', 'def experiment(variant):'
).replace(
  "  return Experiment(\n    name='tried'",
  "  if variant not in ('wide', 'deep'):\n"
  "    raise LookupError('wide or deep')\n"
  "  return Experiment(\n    name=f'tried_{variant}'",
)


def test_one_file_has_several_variants(tmp_path):
  path = tmp_path / 'tried.py'
  path.write_text(VARIANTS)
  for variant in ('wide', 'deep'):
    made = load_experiment(f'{path}:{variant}', ['--steps', '700'])
    assert made.name == f'tried_{variant}'
    assert made.steps == 700
    assert made.origin.source == f'{path}:{variant}'
  with pytest.raises(InputError, match="no variant 'flat': wide or deep"):
    load_experiment(f'{path}:flat')
  with pytest.raises(InputError, match=r'takes a variant: give .*py:VARIANT'):
    load_experiment(path)


def test_a_file_without_variants_takes_none(path):
  with pytest.raises(InputError, match='takes no variant: leave out :wide'):
    load_experiment(f'{path}:wide')


def test_a_colon_may_be_part_of_a_path(tmp_path):
  folder = tmp_path / '12:30'
  folder.mkdir()
  (folder / 'tried.py').write_text(FILE)
  assert load_experiment(folder / 'tried.py').name == 'tried'
  (tmp_path / 'a:b').write_text('')
  assert split_source(str(tmp_path / 'a:b')) == (str(tmp_path / 'a:b'), '')


@pytest.mark.parametrize(
  ('source', 'expected'),
  [('a/b.py:c', 'run/experiment.py:c'), ('a/b.py', 'run/experiment.py')],
)
def test_a_copy_has_the_same_variant(source, expected):
  assert elsewhere(source, 'run/experiment.py') == expected
