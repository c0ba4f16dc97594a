"""NEXUS in every context, in training, and with its parts exchanged."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msba_jax import losses
from msba_jax.models.backbones.conv import ConvNet
from msba_jax.models.context import Context, MemoryBank, batch, solo
from msba_jax.models.cross_window_regions import GridAttention
from msba_jax.models.nexus import nexus
from msba_jax.retrieval.devices import data_mesh
from tests.models.conftest import TINY, applied, initialised

VALID = jnp.ones(8, bool)
LABELS = jnp.array([0, 0, 1, 1, 2, 2, 3, 3])


@pytest.fixture
def run():
  """`run(images, context)` of the small NEXUS."""
  _, params = initialised('nexus')
  return functools.partial(applied('nexus'), params)


def test_1_permuting_the_batch_permutes_the_outputs(run, images, rng):
  order = rng.permutation(8)
  _, out = run(images, batch(VALID))
  _, permuted = run(images[order], batch(VALID))
  for name in ('solo', 'context'):
    np.testing.assert_allclose(permuted[name], out[name][order], atol=5e-6)
  expected = out['attention'][..., order, :][..., order]
  np.testing.assert_allclose(permuted['attention'], expected, atol=5e-6)


def test_2_a_masked_image_has_no_influence_at_all(images):
  model, params = initialised('nexus')
  valid = VALID.at[3].set(False)

  @jax.jit
  @jax.grad
  def gradient(images):
    embeddings, _ = model.apply(
      {'params': params}, images, context=batch(valid)
    )
    return jnp.sum(jnp.where(valid[:, None], embeddings, 0) ** 3)

  found = np.asarray(gradient(images))
  assert np.all(found[3] == 0)
  assert np.all(np.abs(found[np.asarray(valid)]).max((1, 2, 3)) > 0)


def test_3_who_has_nobody_stays_as_it_is(run, images):
  _, out = run(images, solo)
  for nobody in (
    batch(~VALID),
    batch(VALID & (jnp.arange(8) == 0)),
    Context(out['regions'], ~VALID),
  ):
    embeddings, told = run(images, nobody)
    chex.assert_tree_all_finite(told)
    np.testing.assert_allclose(embeddings[0], out['solo'][0], atol=1e-6)


def test_4_solo_and_choices_do_not_depend_on_the_batch(run, images):
  embeddings, out = run(images, solo)
  changed, told = run(images.at[1:].set(-2 * images[1:]), solo)
  np.testing.assert_allclose(changed[0], embeddings[0], atol=2e-6)
  alone, single = run(images[:1], solo)
  np.testing.assert_allclose(alone[0], embeddings[0], atol=2e-6)
  for found in (told, single):
    for name in ('kept', 'stripe'):
      np.testing.assert_allclose(
        found['aux']['msw'][name][:, 0], out['aux']['msw'][name][:, 0]
      )


def test_5_padding_with_invalid_images_changes_nothing(run, images):
  embeddings, _ = run(images[:5], batch(VALID[:5]))
  padded, _ = run(images, batch(VALID.at[5:].set(False)))
  np.testing.assert_allclose(padded[:5], embeddings, atol=5e-6)


def test_6_eight_devices_give_the_same(images):
  model, params = initialised('nexus')

  def loss(params, images):
    embeddings, _ = model.apply(
      {'params': params},
      images,
      context=batch(VALID),
      rngs={'dropout': jax.random.key(5)},
    )
    return jnp.sum(embeddings**3), embeddings

  results = []
  for devices in (1, 8):
    mesh = data_mesh(jax.devices()[:devices])
    split = NamedSharding(mesh, PartitionSpec('data'))
    both = NamedSharding(mesh, PartitionSpec())
    placed = jax.device_put(images, split)
    (_, embeddings), gradients = jax.jit(
      jax.value_and_grad(loss, has_aux=True)
    )(jax.device_put(params, both), placed)
    results.append((np.asarray(embeddings), jax.device_get(gradients)))
  (alone, of_alone), (embeddings, gradients) = results
  np.testing.assert_allclose(embeddings, alone, atol=1e-5)
  chex.assert_trees_all_close(gradients, of_alone, rtol=1e-3, atol=1e-4)


def test_7_memory_beside_the_batch_is_switched_by_masks(run, images):
  _, out = run(images, solo)
  memory = MemoryBank(out['regions'][:, ::-1], VALID)
  alone, _ = run(images, batch(VALID))
  foreign, _ = run(images, memory.context())
  empty = Context(memory.regions, ~VALID)
  beside, _ = run(images, batch(VALID, memory=empty))
  np.testing.assert_allclose(beside, alone, atol=5e-6)
  only, _ = run(images, batch(~VALID, memory=memory.context()))
  np.testing.assert_allclose(only, foreign, atol=5e-6)


def test_every_parameter_learns_from_the_losses(images):
  model, params = initialised('nexus')
  terms = losses.nexus_losses(
    losses.supervised_contrastive, classification_weight=0.5
  )

  @jax.jit
  @jax.grad
  def gradient(params):
    _, out = model.apply(
      {'params': params},
      images,
      context=batch(VALID),
      rngs={'dropout': jax.random.key(0)},
    )
    values = {'label': LABELS, 'valid': VALID}
    return sum(t.weight * t.function(out, values) for t in terms)

  gradients = gradient(params)
  chex.assert_tree_all_finite(gradients)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
  ('heads', 'sparse_heads', 'told'),
  [((0, 0, 0, 0), 2, {'kept'}), ((1, 1, 0, 0), 0, {'stripe'})],
)
def test_kinds_without_heads_are_left_out(images, heads, sparse_heads, told):
  model = nexus(
    ConvNet(TINY),
    features=9,
    heads=heads,
    sparse_heads=sparse_heads,
    context_heads=3,
  )
  _, out = jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0]
  found = {'kept', 'stripe'} & set(out['aux']['msw'])
  assert found == told


@pytest.mark.parametrize(
  ('heads', 'sparse_heads'), [((3, 3, 1, 1), 1), ((0, 0, 0, 0), 0)]
)
def test_numbers_of_heads_that_cannot_be_are_named(heads, sparse_heads):
  message = f'{sum(heads)} \\+ {sparse_heads}, must be from 1 to features=8'
  with pytest.raises(ValueError, match=message):
    nexus(ConvNet(TINY), features=8, heads=heads, sparse_heads=sparse_heads)


def test_exchanged_mixers_and_scales(images):
  model = nexus(
    ConvNet(TINY),
    features=8,
    embedding=6,
    context_heads=2,
    parts=2,
    scales=(1, 2),
    mixers=(functools.partial(GridAttention, 2),),
  )
  (embeddings, out), _ = jax.jit(
    functools.partial(model.init_with_output, context=batch(VALID))
  )(jax.random.key(0), images)
  chex.assert_shape(embeddings, (8, 6))
  chex.assert_shape(out['regions'], (4, 8, 4, 8))
  assert not out['aux']['msw']
