"""Small models that are compiled once for the whole directory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.backbones.conv import ConvNet, ConvSpec
from msba_jax.models.castle import castle
from msba_jax.models.controls import BackboneOnly, BatchFormer
from msba_jax.models.msba import msba
from msba_jax.models.nexus import nexus

TINY = ConvSpec((4, 8), (1, 1), levels=2)


def make_model(name, classes=5):
  """A model of a few thousand parameters."""
  backbone = ConvNet(TINY)
  if name == 'msba':
    return msba(
      backbone, features=8, embedding=6, num_heads=2, num_classes=classes
    )
  if name == 'castle':
    return castle(
      backbone,
      features=8,
      embedding=6,
      num_heads=4,
      num_classes=classes,
      width=8,
    )
  if name == 'nexus':
    return nexus(
      backbone,
      features=8,
      embedding=6,
      heads=(1, 1, 0, 0),
      sparse_heads=2,
      context_heads=4,
      num_classes=classes,
      widths=(1, 2),
      region=2,
      parts=2,
      own=2,
      foreign=3,
    )
  kind = {'backbone': BackboneOnly, 'batchformer': BatchFormer}[name]
  return kind(backbone, features=8, hidden=8, embedding=6, num_classes=classes)


def perturbed(variables, size):
  """Parameters none of which is a special value."""
  leaves, tree = jax.tree.flatten(variables)
  rng = np.random.default_rng(1)
  leaves = [x + size * rng.normal(size=x.shape).astype('f4') for x in leaves]
  return jax.tree.unflatten(tree, leaves)


@functools.cache
def initialised(name):
  """The model and parameters, none of which is a special value."""
  model = make_model(name)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, 16, 16, 3)))[
    'params'
  ]
  return model, perturbed(params, 0.1)


@functools.cache
def applied(name):
  """A compiled `apply(params, images, context)`."""
  model, _ = initialised(name)
  return jax.jit(
    lambda params, images, context: model.apply(
      {'params': params}, images, context=context
    )
  )


@pytest.fixture
def images(rng):
  """Eight random images."""
  return jnp.asarray(rng.normal(size=(8, 16, 16, 3)), jnp.float32)


@pytest.fixture
def run():
  """`run(images, context)` of the small MSBA."""
  _, params = initialised('msba')
  return functools.partial(applied('msba'), params)
