"""Tests of trainings that begin with imported weights."""

import dataclasses
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.data.errors import InputError
from msba_jax.models.backbones.conv import ConvNet
from msba_jax.models.backbones.vit import ViT, ViTSpec
from msba_jax.models.controls import BackboneOnly
from msba_jax.models.weights import unstack_blocks
from msba_jax.training.begin import pretrained_backbone
from msba_jax.training.experiment import Experiment
from msba_jax.training.pretrained import (
  Preprocessing,
  Pretrained,
  save_pretrained,
)

SPEC = ViTSpec(8, 2, 2, patch=4, image=16, layer_scale=1.0)
IMAGES = jnp.zeros((1, 16, 16, 3))


class Wrapped(nn.Module):
  """A backbone with something of its own around another."""

  backbone: nn.Module

  @nn.compact
  def __call__(self, images, *, train=False):
    (grid,) = self.backbone(images, train=train)
    return (nn.Dense(8, name='more')(grid),)


def experiment(backbone, **changes):
  data = SimpleNamespace(size=16, interpolation='bicubic')
  data = SimpleNamespace(**(vars(data) | changes.pop('data', {})))
  return Experiment(
    name='x',
    model=BackboneOnly(backbone),
    losses=(),
    data=data,
    **({'mean': (0.1, 0.2, 0.3), 'std': (1.0, 1.0, 1.0)} | changes),
  )


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """A directory of imported weights, and what it holds."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes(ViT(SPEC))
  )
  directory = tmp_path_factory.mktemp('imported') / 'weights'
  save_pretrained(
    directory,
    Pretrained(
      'dinov2',
      SPEC,
      None,
      Preprocessing(16, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), 'bicubic'),
      {'backbone': params},
    ),
    source='random',
  )
  return directory, params['params']


def initial(backbone):
  return backbone.init(jax.random.key(0), IMAGES)


def shapes(backbone):
  return jax.eval_shape(backbone.init, jax.random.key(0), IMAGES)


def begun(backbone, directory, before=None, **changes):
  before = shapes(backbone) if before is None else before
  return pretrained_backbone(
    experiment(backbone, **changes), directory, before
  )['params']


def assert_same(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_backbone_is_the_imported_one(weights):
  directory, params = weights
  assert_same(begun(ViT(SPEC), directory), params)
  # The initial factor of the branches is of no account.
  vit = ViT(dataclasses.replace(SPEC, layer_scale=1e-4))
  assert_same(begun(vit, directory), params)
  scanned = begun(ViT(SPEC, scan=True), directory)
  assert_same(unstack_blocks(scanned), params)


def test_what_is_around_it_stays_as_it_was(weights):
  directory, params = weights
  backbone = Wrapped(ViT(SPEC))
  before = initial(backbone)
  after = begun(backbone, directory, before)
  assert_same(after['backbone'], params)
  assert_same(after['more'], before['params']['more'])
  with pytest.raises(InputError, match='does not hold the whole backbone'):
    begun(backbone, directory)


@pytest.mark.parametrize('scan', [False, True])
def test_other_keys_leave_queries_and_values(weights, scan):
  directory, params = weights

  def plain_keys(features, *, grid, prefix, name):
    assert (grid, prefix) == ((4, 4), 1)
    return nn.Dense(features, name=name)

  backbone = ViT(SPEC, keys=plain_keys, scan=scan)
  before = initial(backbone)
  after = begun(backbone, directory, before)
  before = before['params']
  assert jax.tree.structure(after) == jax.tree.structure(before)
  if scan:
    before, after = unstack_blocks(before), unstack_blocks(after)
  own = after['block_1']['attention']
  joined = params['block_1']['attention']['qkv']
  for name in ('kernel', 'bias'):
    queries, _, values = np.split(joined[name], 3, axis=-1)
    np.testing.assert_array_equal(
      own['queries_values'][name], np.concatenate([queries, values], axis=-1)
    )
  assert_same(own['keys'], before['block_1']['attention']['keys'])
  assert_same(own['out'], params['block_1']['attention']['out'])


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'mean': (0.0, 0.2, 0.3)}, r'mean=\(0.0, 0.2, 0.3\), but the weights'),
    ({'std': (1.0, 2.0, 1.0)}, r'std=\(1.0, 2.0, 1.0\), but the weights'),
    ({'data': {'size': 32}}, r'data.size=32, but the weights .* are for 16'),
    (
      {'data': {'interpolation': 'bilinear'}},
      r"data.interpolation='bilinear', but .* are for 'bicubic'",
    ),
  ],
)
def test_images_must_be_prepared_as_for_the_weights(weights, change, said):
  with pytest.raises(InputError, match=said):
    begun(ViT(SPEC), weights[0], **change)


@pytest.mark.parametrize(
  ('backbone', 'said'),
  [
    (ConvNet(), 'x has no ViT, Swin or ResNet'),
    (
      ViT(dataclasses.replace(SPEC, depth=3, image=8)),
      'another backbone .*: depth=2, not 3; image=16, not 8',
    ),
    (
      ViT(dataclasses.replace(SPEC, layer_scale=None)),
      'layer_scale=1.0, not None',
    ),
  ],
)
def test_another_backbone_is_refused(weights, backbone, said):
  with pytest.raises(InputError, match=said):
    begun(backbone, weights[0])


def test_a_directory_without_weights_is_named(tmp_path):
  with pytest.raises(InputError, match='make them with `msba import-weights`'):
    begun(ViT(SPEC), tmp_path / 'nothing')


def test_a_frozen_backbone_is_not_also_a_pretrained_one():
  with pytest.raises(ValueError, match='exclude each other'):
    experiment(ViT(SPEC), pretrained='a', frozen_backbone='b')
