"""A training that begins with imported weights.

Attributes:
  begin_pretrained: the first state with the backbone's imported parameters.
  pretrained_backbone: the imported variables of an experiment's backbone.
  placed: a tree with a node at a path.
"""

import dataclasses
import functools
from collections.abc import Mapping
from operator import getitem
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msba_jax.data.errors import InputError
from msba_jax.models.backbones.resnet import ResNet
from msba_jax.models.backbones.swin import Swin
from msba_jax.models.backbones.vit import ViT
from msba_jax.models.weights import stack_blocks
from msba_jax.training.experiment import Experiment
from msba_jax.training.pretrained import Preprocessing, load_pretrained
from msba_jax.training.state import TrainState

__all__ = ['begin_pretrained', 'placed', 'pretrained_backbone']


def begin_pretrained(experiment: Experiment, state: TrainState) -> TrainState:
  """The first state with the backbone's imported parameters.

  What the checkpoint has nothing for, such as another projection of the keys,
  stays as it was initialised.

  Args:
    experiment: with `pretrained` set.
    state: from `create_state`.

  Returns:
    The state; its moving average begins with the same parameters.

  Raises:
    InputError: the weights cannot be read, or are for another backbone or
      other images than those of the experiment.
  """
  collections = {'params': state.params, **state.statistics}
  initial = {
    name: collection['backbone']
    for name, collection in collections.items()
    if 'backbone' in collection
  }
  found = pretrained_backbone(experiment, experiment.pretrained, initial)
  for name, backbone in found.items():
    backbone = jax.tree.map(jnp.asarray, backbone)
    collections[name] = {**collections[name], 'backbone': backbone}
  params = collections.pop('params')
  return dataclasses.replace(
    state,
    params=params,
    ema=jax.tree.map(jnp.copy, params),
    statistics=collections,
  )


def pretrained_backbone(
  experiment: Experiment, directory: str | Path, initial: Any
) -> Any:
  """The imported variables of an experiment's backbone.

  Args:
    experiment: its model has a pretrained kind of backbone, or one inside of
      its backbone.
    directory: of imported weights.
    initial: variables of the whole backbone, for what the checkpoint has
      nothing for; shapes alone if there must be no such thing.

  Returns:
    The variables of the whole backbone, in the structure of `initial`.

  Raises:
    InputError: see `begin_pretrained`.
  """
  loaded = load_pretrained(directory)
  module, path = _find(experiment)
  _compare(loaded.backbone, module.spec, directory)
  _check_images(loaded.preprocessing, experiment, directory)
  variables = loaded.parts['backbone']
  if getattr(module, 'scan', False):
    variables = {name: stack_blocks(x) for name, x in variables.items()}
  found = {
    name: placed(
      tree,
      path,
      _merged(variables[name], functools.reduce(getitem, path, tree)),
    )
    if name in variables
    else tree
    for name, tree in initial.items()
  }
  if any(
    isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found)
  ):
    raise InputError(
      f'{directory} does not hold the whole backbone of {experiment.name}; '
      'use it as `pretrained`, not as `frozen_backbone`'
    )
  return found


def _find(experiment: Experiment) -> tuple[Any, tuple[str, ...]]:
  """The pretrained kind of module, and the path to it in the backbone."""
  module, path = getattr(experiment.model, 'backbone', None), ()
  while module is not None and not isinstance(module, (ViT, Swin, ResNet)):
    module, path = getattr(module, 'backbone', None), (*path, 'backbone')
  if module is None:
    raise InputError(
      f'{experiment.name} has no ViT, Swin or ResNet as its backbone; imported '
      'weights are for one'
    )
  return module, path


def _compare(found: Any, wanted: Any, directory: str | Path) -> None:
  """Raises unless two specs are one."""
  if type(found) is not type(wanted):
    raise InputError(
      f'the weights in {directory} are for a backbone of another kind: {found}'
    )
  different = [
    f'{field.name}={getattr(found, field.name)!r}, not '
    f'{getattr(wanted, field.name)!r}'
    for field in dataclasses.fields(found)
    # What only initialises or selects does not matter.
    if field.name not in ('layer_scale', 'levels')
    and getattr(found, field.name) != getattr(wanted, field.name)
  ]
  scales = [getattr(x, 'layer_scale', None) for x in (found, wanted)]
  if (scales[0] is None) != (scales[1] is None):
    different.append(f'layer_scale={scales[0]}, not {scales[1]}')
  if different:
    raise InputError(
      f'the weights in {directory} are for another backbone than that of the '
      f'experiment: {"; ".join(different)}'
    )


def _check_images(
  wanted: Preprocessing, experiment: Experiment, directory: str | Path
) -> None:
  """Raises unless images are prepared as they were for the weights."""
  data = experiment.data
  given = {
    'data.size': (getattr(data, 'size', None), wanted.size),
    'data.interpolation': (
      getattr(data, 'interpolation', None),
      wanted.interpolation,
    ),
    'mean': (experiment.mean, wanted.mean),
    'std': (experiment.std, wanted.std),
  }
  for name, (ours, theirs) in given.items():
    same = ours == theirs
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
      same = len(ours) == len(theirs) and np.allclose(ours, theirs, atol=1e-6)
    if not same:
      raise InputError(
        f'{name}={ours!r}, but the weights in {directory} are for {theirs!r}; '
        'set it in the experiment, or import the weights again with --size if '
        'it is the size that shall differ'
      )


def placed(tree: Mapping[str, Any], path: tuple[str, ...], node: Any) -> Any:
  """The tree with a node at a path, which is made where it is missing."""
  if not path:
    return node
  first, *rest = path
  return {**tree, first: placed(tree.get(first, {}), tuple(rest), node)}


def _merged(params: Mapping[str, Any], initial: Mapping[str, Any]) -> Any:
  """Imported parameters, in the structure of the initial ones."""
  if 'queries_values' in initial and 'qkv' in params:
    joined = params['qkv']
    apart = {
      name: np.concatenate(np.split(array, 3, axis=-1)[::2], axis=-1)
      for name, array in joined.items()
    }
    params = {**params, 'queries_values': apart}
  return {
    name: (
      _merged(params[name], node) if isinstance(node, Mapping) else params[name]
    )
    if name in params
    else node
    for name, node in initial.items()
  }
