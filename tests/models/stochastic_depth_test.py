"""Tests of branches that are left out at random, in ViT and Swin."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.backbones.swin import Swin, SwinSpec
from msba_jax.models.backbones.vit import ViT, ViTSpec
from msba_jax.models.stochastic_depth import drop_branch, drop_rates

VIT = ViT(
  ViTSpec(8, 3, 2, patch=4, image=8, class_token=False), stochastic_depth=0.5
)
SWIN = Swin(
  SwinSpec(4, (1, 1), (1, 2), window=2, patch=2), stochastic_depth=0.5
)
SWIN = dataclasses.replace(SWIN, spec=dataclasses.replace(SWIN.spec, levels=2))


class Branch(nn.Module):
  """One branch and nothing beside it."""

  rate: float

  def __call__(self, inputs):
    return drop_branch(self, inputs, jnp.float32(self.rate))


@pytest.mark.parametrize('rate', [0.0, 0.25, 0.9])
def test_a_branch_is_there_whole_or_not_at_all_and_itself_in_the_mean(rate):
  ones = jnp.ones((4000, 2, 3))
  out = np.asarray(
    Branch(rate).apply({}, ones, rngs={'dropout': jax.random.key(3)})
  )
  assert (out == out[:, :1, :1]).all()
  np.testing.assert_allclose(np.unique(out.round(4))[-1], 1 / (1 - rate), 1e-4)
  left_out = np.mean(out[:, 0, 0] == 0)
  assert abs(left_out - rate) < 4 * np.sqrt(rate * (1 - rate) / 4000) + 1e-9
  assert np.unique(out).size == (2 if rate else 1)


def test_rates_rise_from_the_first_block_to_the_last():
  rates = drop_rates(0.3, 4, train=True)
  np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3], atol=1e-7)
  assert drop_rates(0.3, 4, train=False) == [None] * 4
  assert drop_rates(0.0, 4, train=True) == [None] * 4
  for wrong in (-0.1, 1.0):
    with pytest.raises(ValueError, match=f'stochastic_depth={wrong}'):
      drop_rates(wrong, 4, train=False)


@pytest.mark.parametrize(
  ('model', 'option'),
  [
    (VIT, ''),
    (VIT, 'remat'),
    (VIT, 'scan'),
    (SWIN, ''),
    (SWIN, 'remat'),
  ],
)
def test_training_leaves_branches_out_and_inference_does_not(
  rng, model, option
):
  if option:
    model = dataclasses.replace(model, **{option: True})
  images = jnp.asarray(rng.normal(size=(1, 8, 8, 3)), jnp.float32)
  images = jnp.tile(images, (64, 1, 1, 1))
  plain = dataclasses.replace(model, stochastic_depth=0.0)
  variables = plain.init(jax.random.key(0), images)

  @jax.jit
  def trained(key):
    return model.apply(variables, images, train=True, rngs={'dropout': key})[-1]

  whole = jax.jit(plain.apply)(variables, images)[-1]
  same = jax.jit(model.apply)(variables, images)[-1]
  np.testing.assert_array_equal(same, whole)
  one, again, other = map(trained, map(jax.random.key, (0, 0, 1)))
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 1e-3
  # Equal images differ by their branches: two a block, but for the first one.
  kinds = np.unique(np.asarray(one).reshape(64, -1).round(3), axis=0)
  droppable = 4 if isinstance(model, ViT) else 2
  assert 2**droppable // 2 < len(kinds) <= 2**droppable
