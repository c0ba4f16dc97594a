"""The eight properties of MSBA, and that its parts are what they say."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax.models.context import Context, batch, solo
from tests.models.conftest import applied, initialised

VALID = jnp.ones(8, bool)


def test_1_permuting_the_batch_permutes_the_outputs(run, images, rng):
  order = rng.permutation(8)
  _, out = run(images, batch(VALID))
  _, permuted = run(images[order], batch(VALID))
  for name in ('solo', 'context'):
    np.testing.assert_allclose(permuted[name], out[name][order], atol=2e-6)
  np.testing.assert_allclose(
    permuted['attention'],
    out['attention'][:, :, :, order][..., order],
    atol=2e-6,
  )


def test_2_a_masked_image_has_no_influence_at_all(images):
  model, params = initialised('msba')
  valid = VALID.at[3].set(False)

  @jax.jit
  def gradient(images):
    def others(images):
      embeddings, _ = model.apply(
        {'params': params}, images, context=batch(valid)
      )
      return jnp.sum(jnp.where(valid[:, None], embeddings, 0) ** 3)

    return jax.grad(others)(images)

  found = np.asarray(gradient(images))
  assert np.all(found[3] == 0)
  assert np.all(np.abs(found[np.asarray(valid)]).max((1, 2, 3)) > 0)


def test_3_rows_of_attention_sum_to_one_or_to_zero(run, images):
  _, out = run(images, batch(VALID.at[2].set(False)))
  attention = np.asarray(out['attention'])
  np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-6)
  assert np.all(attention[..., 2] == 0)
  _, out = run(images, batch(~VALID))
  assert np.all(np.asarray(out['attention']) == 0)
  chex.assert_tree_all_finite(out)


def test_4_a_batch_of_one_is_finite_and_looks_at_itself(run, images):
  _, out = run(images[:1], batch(VALID[:1]))
  chex.assert_tree_all_finite(out)
  assert np.all(np.asarray(out['attention']) == 1)
  assert np.abs(out['context'] - out['solo']).max() > 1e-3


def test_4_solo_does_not_depend_on_the_batch(run, images):
  _, out = run(images, solo)
  _, changed = run(images.at[1:].set(7.0), solo)
  np.testing.assert_array_equal(out['solo'][0], changed['solo'][0])
  _, alone = run(images[:1], solo)
  np.testing.assert_allclose(alone['solo'], out['solo'][:1], atol=1e-6)


def test_5_padding_with_invalid_images_changes_nothing(run, images):
  embeddings, _ = run(images[:5], batch(VALID[:5]))
  padded, _ = run(images, batch(VALID.at[5:].set(False)))
  np.testing.assert_allclose(padded[:5], embeddings, atol=1e-6)
  other, _ = run(images.at[5:].set(9.0), batch(VALID.at[5:].set(False)))
  np.testing.assert_array_equal(other[:5], padded[:5])


@pytest.mark.parametrize('devices', [2, 4, 8])
def test_6_the_same_numbers_on_any_number_of_devices(images, devices):
  model, params = initialised('msba')
  mesh = jax.make_mesh(
    (devices,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:devices],
  )
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def value(params, images, valid):
    embeddings, _ = model.apply(
      {'params': params}, images, context=batch(valid)
    )
    return jnp.sum(embeddings**3), embeddings

  with jax.default_matmul_precision('highest'):
    compute = jax.jit(jax.value_and_grad(value, has_aux=True))
    (_, expected), gradient = compute(params, images, VALID)
    (_, found), sharded = compute(
      jax.device_put(params, whole), *jax.device_put((images, VALID), rows)
    )
  np.testing.assert_allclose(found, expected, atol=1e-6)
  norm = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
  chex.assert_trees_all_close(sharded, gradient, atol=1e-5 * norm)


def test_7_attention_runs_over_images_not_over_heads():
  model, params = initialised('msba')
  rng = np.random.default_rng(2)
  regions = jnp.asarray(rng.normal(size=(2, 3, 14, 8)), jnp.float32)

  @jax.jit
  def influence(regions):
    def updated(regions):
      return model.bind({'params': params}).bcp(
        regions, batch(jnp.ones(3, bool))
      )[0][1, :, 5]

    return jax.jacobian(updated)(regions)

  # (n asking, feature, l, m answering, r, feature): level 1, region 5 asks.
  strength = np.abs(np.asarray(influence(regions))).max((1, 5))
  assert np.all(strength[:, 1, :, 5] > 0)
  strength[:, 1, :, 5] = 0
  assert np.all(strength == 0)


def test_8_an_empty_context_equals_solo_exactly(run, images):
  _, alone = run(images, solo)
  embeddings, out = run(images, batch(~VALID))
  np.testing.assert_array_equal(embeddings, out['solo'])
  np.testing.assert_allclose(embeddings, alone['solo'], atol=1e-6)
  nobody = Context(alone['regions'], ~VALID, None)
  _, foreign = run(images, nobody)
  np.testing.assert_array_equal(foreign['context'], foreign['solo'])


def test_embeddings_are_unit_and_named_parts_have_their_shapes(run, images):
  embeddings, out = run(images, batch(VALID))
  np.testing.assert_allclose(jnp.linalg.norm(embeddings, axis=-1), 1, atol=1e-5)
  chex.assert_shape(out['regions'], (2, 8, 14, 8))
  chex.assert_shape(out['memory'], (2, 8, 14, 8))
  chex.assert_shape(out['attention'], (2, 14, 2, 8, 8))
  chex.assert_shape(out['proxies'], (5, 6))
  assert set(out['aux']) == {'msw', 'graph', 'bcp', 'cfi', 'caf'}
  np.testing.assert_array_equal(embeddings, out['context'])


def test_encode_then_refine_is_the_whole_model(run, images):
  model, params = initialised('msba')

  @jax.jit
  def in_two_steps(images):
    bound = model.bind({'params': params})
    return bound.refine(bound.encode(images), context=batch(VALID))[0]

  embeddings = in_two_steps(images)
  expected, _ = run(images, batch(VALID))
  np.testing.assert_allclose(embeddings, expected, atol=2e-6)


def test_foreign_images_equal_those_of_the_batch_where_bias_is_none(
  run, images
):
  """An image with k foreign images: each changes it, a masked one does not."""
  _, gallery = run(images, solo)
  few = Context(gallery['regions'][:, 1:4], VALID[1:4], None)
  more = Context(gallery['regions'], VALID.at[0].set(False).at[4:].set(False))
  expected, _ = run(images[:1], few)
  found, _ = run(images[:1], more)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  order = jnp.array([2, 0, 1])
  permuted = Context(few.regions[:, order], few.valid, None)
  np.testing.assert_allclose(run(images[:1], permuted)[0], expected, atol=1e-6)


def test_batch_and_memory_switch_by_mask(run, images):
  """Context dropout: the masks of one joint context choose the mode."""
  _, gallery = run(images[4:], solo)
  memory = Context(gallery['regions'], VALID[4:], None)
  nobody = memory._replace(valid=~memory.valid)
  asking, four = images[:4], VALID[:4]
  for joint, expected in (
    (batch(four, memory=nobody), batch(four)),
    (batch(~four, memory=memory), memory),
    (batch(~four, memory=nobody), solo),
  ):
    np.testing.assert_allclose(
      run(asking, joint)[0], run(asking, expected)[0], atol=2e-6
    )


def test_a_bias_steers_the_attention(run, images):
  towards = jnp.zeros((8, 8)).at[:, 6].set(500.0)
  _, out = run(images, batch(VALID, bias=towards))
  others = np.delete(np.asarray(out['attention']), 6, axis=-2)
  np.testing.assert_allclose(others[..., 6], 1, atol=1e-5)
  gallery = Context(out['regions'], VALID, towards)
  _, out = run(images, gallery)
  np.testing.assert_allclose(out['attention'][..., 6], 1, atol=1e-5)


def test_every_parameter_has_a_gradient(images):
  model, params = initialised('msba')

  @jax.jit
  @jax.grad
  def gradient(params):
    embeddings, out = model.apply(
      {'params': params}, images, context=batch(VALID)
    )
    return jnp.sum(embeddings**3) + jnp.sum(out['proxies'] ** 2)

  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
    assert np.abs(np.asarray(leaf)).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.usefixtures('unchecked')
def test_wrong_contexts_are_named(images):
  model, params = initialised('msba')
  with pytest.raises(TypeError, match='context must be solo'):
    model.apply({'params': params}, images, context='batch')
  with pytest.raises(ValueError, match='one entry an image'):
    model.apply({'params': params}, images, context=batch(VALID[:3]))


@pytest.mark.parametrize('name', ['backbone', 'batchformer'])
def test_controls_share_the_interface(images, name):
  model, params = initialised(name)
  apply = applied(name)
  assert not model.contextual
  embeddings, out = apply(params, images, batch(VALID))
  _, alone = apply(params, images, solo)
  _, empty = apply(params, images, batch(~VALID))
  chex.assert_shape(embeddings, (8, 6))
  chex.assert_shape(out['regions'], (1, 8, 1, 8))
  chex.assert_shape(out['proxies'], (5, 6))
  np.testing.assert_allclose(out['solo'], alone['solo'], atol=1e-6)
  np.testing.assert_array_equal(empty['context'], empty['solo'])
  np.testing.assert_allclose(jnp.linalg.norm(embeddings, axis=-1), 1, atol=1e-5)
  bound = model.bind({'params': params})
  refined = jax.jit(lambda images: bound.refine(bound.encode(images))[0])(
    images
  )
  np.testing.assert_allclose(refined, alone['solo'], atol=1e-6)
  gallery = Context(out['regions'], VALID, None)
  _, foreign = apply(params, images, gallery)
  np.testing.assert_array_equal(foreign['context'], foreign['solo'])
  mixes = np.abs(out['context'] - out['solo']).max() > 1e-3
  assert mixes == (name == 'batchformer')


def test_batchformer_mixes_the_batch_and_no_masked_image(images):
  _, params = initialised('batchformer')
  apply = applied('batchformer')
  valid = VALID.at[3].set(False)
  embeddings, _ = apply(params, images, batch(valid))
  changed, _ = apply(params, images.at[3].add(1.0), batch(valid))
  other, _ = apply(params, images.at[4].add(1.0), batch(valid))
  keep = np.asarray([0, 1, 2, 4, 5, 6, 7])
  np.testing.assert_array_equal(changed[keep], embeddings[keep])
  assert np.abs(other[0] - embeddings[0]).max() > 1e-6
