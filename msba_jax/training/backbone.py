"""The backbone of an experiment, without what follows it.

Attributes:
  backbone_path: from a model to its backbone.
  without_fusers: an experiment whose model has the backbone alone.
  read_backbone: the variables that a finished run or imported weights hold.
  initial_backbone: the variables with which a training begins.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msba_jax.data.directory import MANIFEST
from msba_jax.data.errors import InputError
from msba_jax.models.mmfuser import FusedBackbone
from msba_jax.training.begin import pretrained_backbone
from msba_jax.training.experiment import Experiment
from msba_jax.training.weights import load_weights

__all__ = [
  'backbone_path',
  'initial_backbone',
  'read_backbone',
  'without_fusers',
]


def backbone_path(model: nn.Module) -> tuple[str, ...]:
  """From a model to its backbone, through fusers."""
  path, part = ('backbone',), getattr(model, 'backbone', None)
  while isinstance(part, FusedBackbone):
    path, part = (*path, 'backbone'), part.backbone
  return path


def without_fusers(experiment: Experiment) -> Experiment:
  """The experiment with a model whose backbone is not fused."""
  model: Any = experiment.model
  backbone = functools.reduce(getattr, backbone_path(model), model)
  return dataclasses.replace(experiment, model=model.clone(backbone=backbone))


def read_backbone(run: Path, experiment: Experiment) -> Any:
  """The variables of a backbone that was trained or imported.

  Args:
    run: a finished run, or a directory of imported weights.
    experiment: see `without_fusers`; it has the same backbone.

  Returns:
    Collections of variables by name.

  Raises:
    InputError: there is no finished run, or its backbone is another.
  """
  expected = _shapes(experiment)
  if (run / MANIFEST).exists():
    return pretrained_backbone(experiment, run, expected)
  if not (run / 'weights' / MANIFEST).exists():
    raise InputError(
      f'frozen_backbone {run} holds neither a finished run nor imported '
      'weights; give the directory of one'
    )
  found = {
    name: collection['backbone']
    for name, collection in load_weights(run / 'weights').items()
    if 'backbone' in collection
  }
  # That of a run with a fuser is inside of it.
  found = {name: _innermost(tree) for name, tree in found.items()}
  shapes = [
    {
      jax.tree_util.keystr(path): np.shape(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (found, expected)
  ]
  if shapes[0] != shapes[1]:
    wrong = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0]
    raise InputError(
      f'frozen_backbone {run} has another backbone than {experiment.name} '
      f'({wrong[0]} differs); use the same backbone in both'
    )
  return found


def initial_backbone(experiment: Experiment) -> Any:
  """The variables with which the backbone of a training begins.

  Args:
    experiment: see `without_fusers`.

  Returns:
    Those of the frozen backbone, those imported, or random ones.

  Raises:
    InputError: see `read_backbone` and `begin.begin_pretrained`.
  """
  if experiment.frozen_backbone:
    return read_backbone(Path(experiment.frozen_backbone), experiment)
  model: Any = experiment.model
  shape = _images(experiment)
  variables = jax.jit(
    lambda key: model.backbone.init(key, jnp.zeros(shape.shape, shape.dtype))
  )(jax.random.key(experiment.seed))
  variables.pop('penalties', None)
  if experiment.pretrained:
    return pretrained_backbone(experiment, experiment.pretrained, variables)
  return variables


def _innermost(tree: Any) -> Any:
  while 'backbone' in tree:
    tree = tree['backbone']
  return tree


def _shapes(experiment: Experiment) -> Any:
  """Shapes of the backbone's variables."""
  model: Any = experiment.model
  expected: Any = jax.eval_shape(
    model.backbone.init, jax.random.key(0), _images(experiment)
  )
  expected.pop('penalties', None)
  return expected


def _images(experiment: Experiment) -> jax.ShapeDtypeStruct:
  size = experiment.data.size
  return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
