"""Tests of how the rooms depend on each other, and of what the pages say."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import msba_jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(msba_jax.__file__).parent
FILES = sorted(PACKAGE.rglob('*.py'))
# cli → analysis → training → retrieval → models, data → losses, metrics →
# layers: a room sees those below it, and not its neighbour on the same floor.
FLOORS = {
  'layers': 0,
  'losses': 1,
  'metrics': 1,
  'models': 2,
  'data': 2,
  'retrieval': 3,
  'training': 4,
  'analysis': 5,
  'cli': 6,
}
LONGEST_FILE = 350
TEXTS = [
  path
  for pattern in ('*.md', '*.cff', 'docs/**/*.md', 'experiments/*.py')
  for path in sorted(ROOT.glob(pattern))
]


def name_of(path):
  parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports_of(path):
  """Full names of all modules that a file imports, wherever in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}:{node.lineno} imports relatively'
      module = node.module or ''
      if module == 'msba_jax':
        yield from (f'msba_jax.{alias.name}' for alias in node.names)
      else:
        yield module


def room_of(module):
  parts = module.split('.')
  return parts[1] if len(parts) > 1 and parts[0] == 'msba_jax' else None


def run_python(code, **environment):
  """Runs code in a fresh interpreter outside the checkout."""
  return subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, **environment},
    cwd=ROOT.anchor,
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )


def test_every_file_lies_in_a_room():
  rooms = {path.relative_to(PACKAGE).parts[0] for path in FILES}
  assert rooms == {*FLOORS, '__init__.py', '__main__.py'}


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_no_arrow_points_upward(path):
  room = room_of(name_of(path))
  for module in imports_of(path):
    other = room_of(module)
    if module.split('.')[0] != 'msba_jax' or other in (None, room):
      continue
    if other == '__version__':
      continue
    if path.name == '__main__.py':
      assert other == 'cli'
      continue
    assert room is not None, f'msba_jax/__init__.py imports {module}'
    assert FLOORS[other] < FLOORS[room], f'{room} imports {module}'


@pytest.mark.parametrize(
  'path', sorted((PACKAGE / 'layers').rglob('*.py')), ids=name_of
)
def test_layers_import_jax_and_what_it_brings(path):
  for module in imports_of(path):
    top = module.split('.')[0]
    assert (
      # NumPy comes with jax; it makes what is static.
      top in {'jax', 'jaxtyping', 'numpy', *sys.stdlib_module_names}
      or room_of(module) == 'layers'
    ), module


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_no_file_is_long(path):
  length = len(path.read_text().splitlines())
  assert length <= LONGEST_FILE, f'{length} lines: split it'


def test_no_room_is_called_after_nothing():
  vague = {'utils', 'util', 'helpers', 'helper', 'common', 'misc'}
  assert not [path for path in FILES if vague & {path.stem, path.parent.name}]


@pytest.mark.parametrize('name', ['tensorflow', 'torch', 'keras', 'clu'])
def test_nothing_imports_another_framework(name):
  for path in FILES:
    assert name not in {module.split('.')[0] for module in imports_of(path)}


@pytest.mark.slow
def test_importing_everything_starts_no_device_and_no_framework():
  code = """
import importlib, pkgutil, sys
import msba_jax
for module in pkgutil.walk_packages(msba_jax.__path__, 'msba_jax.'):
  importlib.import_module(module.name)
assert 'msba_jax.models' in sys.modules
for name in ('tensorflow', 'torch', 'keras'):
  assert name not in sys.modules, name
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), 'a device was started'
"""
  done = run_python(code)
  assert done.returncode == 0, done.stderr


def test_importing_the_package_alone_imports_not_even_jax():
  done = run_python(
    "import sys, msba_jax; assert 'jax' not in sys.modules, 'jax'"
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path):
  examples = re.findall(
    r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL
  )
  assert len(examples) == 1
  lines = [line for line in examples[0].splitlines() if line.strip()]
  assert len(lines) <= 12
  code = f'import os; os.chdir({str(tmp_path)!r})\n{examples[0]}'
  done = run_python(code, JAX_PLATFORMS='cpu')
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  'example', range(3), ids=['plain', 'shard_map', 'pmap']
)
def test_the_examples_of_single_functions_run(example):
  text = (ROOT / 'docs' / 'one-function.md').read_text()
  examples = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  assert len(examples) == 3
  # Eight devices, so that one share is not the whole.
  done = run_python(
    f'{examples[example]}\nassert len(jax.devices()) == 8',
    JAX_PLATFORMS='cpu',
    XLA_FLAGS='--xla_force_host_platform_device_count=8',
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('path', TEXTS, ids=lambda path: path.name)
def test_texts_mention_no_path_of_a_machine(path):
  found = re.findall(
    r'(?<![\w.])/(?:work|home|root|tmp|opt|Users|mnt)/\S*', path.read_text()
  )
  assert not found


@pytest.mark.parametrize(
  'path', [p for p in TEXTS if p.suffix == '.md'], ids=lambda path: path.name
)
def test_links_of_the_texts_lead_somewhere(path):
  for target in re.findall(r'\]\(([^)#\s]+)[^)]*\)', path.read_text()):
    if not target.startswith(('http:', 'https:', 'mailto:')):
      assert (path.parent / target).exists(), target
