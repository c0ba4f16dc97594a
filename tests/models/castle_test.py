"""The eight properties of CASTLE, its choice of heads, and its switches."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax import losses
from msba_jax.models.backbones.conv import ConvNet
from msba_jax.models.castle import castle
from msba_jax.models.context import Context, MemoryBank, batch, solo
from tests.layers.causal_test import softmax
from tests.models.conftest import TINY, applied, initialised, make_model

VALID = jnp.ones(8, bool)
LABELS = jnp.array([0, 0, 1, 1, 2, 2, 3, 3])


@pytest.fixture
def run():
  """`run(images, context)` of the small CASTLE."""
  _, params = initialised('castle')
  return functools.partial(applied('castle'), params)


def normalized(x, scale, bias):
  """Layer normalisation in float64."""
  x = x - x.mean(axis=-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
  return x * scale + bias


def test_1_permuting_the_batch_permutes_the_outputs(run, images, rng):
  order = rng.permutation(8)
  _, out = run(images, batch(VALID))
  _, permuted = run(images[order], batch(VALID))
  for name in ('solo', 'context'):
    np.testing.assert_allclose(permuted[name], out[name][order], atol=5e-6)
  for found, expected in (
    (permuted['attention'], out['attention']),
    (permuted['aux']['graph']['graph'], out['aux']['graph']['graph']),
  ):
    expected = expected[..., order, :][..., order]
    np.testing.assert_allclose(found, expected, atol=5e-6)
  np.testing.assert_array_equal(
    permuted['aux']['bcp']['heads'], out['aux']['bcp']['heads'][order]
  )


def test_2_a_masked_image_has_no_influence_at_all(images):
  model, params = initialised('castle')
  valid = VALID.at[3].set(False)

  @jax.jit
  @jax.grad
  def gradient(images):
    embeddings, out = model.apply(
      {'params': params}, images, context=batch(valid)
    )
    graph = out['aux']['graph']
    total = jnp.sum(jnp.where(valid[:, None], embeddings, 0) ** 3)
    return total + graph['acyclicity'] + graph['edges']

  found = np.asarray(gradient(images))
  assert np.all(found[3] == 0)
  assert np.all(np.abs(found[np.asarray(valid)]).max((1, 2, 3)) > 0)


def test_3_rows_of_attention_sum_to_one_or_to_zero(run, images):
  """In the batch, a memory beside it, a memory, and alone."""
  someone = VALID.at[2].set(False)
  _, out = run(images, batch(someone))
  memory = MemoryBank(out['regions'], someone)
  _, beside = run(images, batch(someone, memory=memory))
  _, foreign = run(images, memory.context())
  for told, size in ((out, 8), (beside, 16), (foreign, 8)):
    attention = np.asarray(told['attention'])
    chex.assert_shape(attention, (2, 14, 4, 8, size))
    np.testing.assert_allclose(attention.sum(-1), 1, atol=2e-6)
    assert np.all(attention >= 0)
    assert np.all(attention[..., 2::8] == 0)
  for nobody in (
    batch(~VALID),
    batch(~VALID, memory=Context(memory.regions, ~VALID)),
    Context(memory.regions, ~VALID),
  ):
    _, told = run(images, nobody)
    assert np.all(np.asarray(told['attention']) == 0)
    chex.assert_tree_all_finite(told)
  assert run(images, solo)[1]['attention'] is None


def test_3_neighbours_are_a_context_of_each(run, images):
  """One image at a time in its own context, as a search asks."""
  model, params = initialised('castle')
  _, out = run(images, solo)
  regions, valid = out['regions'], VALID.at[2].set(False)

  @jax.jit
  def neighbours(regions, contexts):
    def one(own, others):
      embeddings, told = model.apply(
        {'params': params},
        own[:, None],
        context=Context(others, valid),
        method='refine',
      )
      return embeddings[0], told['attention'][..., 0, :]

    return jax.vmap(one, (1, 1))(regions, contexts)

  contexts = jnp.broadcast_to(regions[:, None], (2, 8, *regions.shape[1:]))
  found, attention = neighbours(regions, contexts)
  expected, together = run(images, Context(regions, valid))
  np.testing.assert_allclose(found, expected, atol=5e-6)
  np.testing.assert_allclose(
    jnp.moveaxis(attention, 0, -2), together['attention'], atol=5e-6
  )
  np.testing.assert_allclose(np.sum(attention, axis=-1), 1, atol=2e-6)


def test_4_a_batch_of_one_is_finite_and_looks_at_itself(run, images):
  _, out = run(images[:1], batch(VALID[:1]))
  chex.assert_tree_all_finite(out)
  np.testing.assert_allclose(out['attention'], 1, atol=1e-6)
  assert np.abs(out['context'] - out['solo']).max() > 1e-3
  _, alone = run(images[:1], solo)
  _, others = run(images.at[1:].set(7.0), solo)
  np.testing.assert_allclose(alone['solo'], others['solo'][:1], atol=1e-6)
  np.testing.assert_allclose(alone['solo'], out['solo'], atol=1e-6)


def test_4_solo_does_not_depend_on_the_batch(run, images):
  _, out = run(images, solo)
  _, changed = run(images.at[1:].set(7.0), solo)
  np.testing.assert_array_equal(out['solo'][0], changed['solo'][0])
  assert np.abs(out['solo'][1] - changed['solo'][1]).max() > 1e-3


def test_5_padding_with_invalid_images_changes_nothing(run, images):
  embeddings, out = run(images[:5], batch(VALID[:5]))
  padded, told = run(images, batch(VALID.at[5:].set(False)))
  np.testing.assert_allclose(padded[:5], embeddings, atol=5e-6)
  for name in ('acyclicity', 'edges'):
    np.testing.assert_allclose(
      told['aux']['graph'][name], out['aux']['graph'][name], atol=1e-6
    )
  other, _ = run(images.at[5:].set(9.0), batch(VALID.at[5:].set(False)))
  np.testing.assert_allclose(other[:5], padded[:5], atol=1e-6)


@functools.cache
def value_and_gradient():
  """Of a function of the embeddings and the graph, by parameters."""
  model, _ = initialised('castle')

  def value(params, images, valid):
    embeddings, out = model.apply(
      {'params': params}, images, context=batch(valid)
    )
    graph = out['aux']['graph']
    return jnp.sum(embeddings**3) + graph['acyclicity'], embeddings

  return jax.jit(jax.value_and_grad(value, has_aux=True))


@pytest.mark.parametrize('devices', [8])
def test_6_the_same_numbers_on_any_number_of_devices(images, devices):
  _, params = initialised('castle')
  mesh = jax.make_mesh(
    (devices,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:devices],
  )
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with jax.default_matmul_precision('highest'):
    compute = value_and_gradient()
    (_, expected), gradient = compute(params, images, VALID)
    (_, found), sharded = compute(
      jax.device_put(params, whole), *jax.device_put((images, VALID), rows)
    )
  np.testing.assert_allclose(found, expected, atol=1e-5)
  norm = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
  chex.assert_trees_all_close(sharded, gradient, atol=1e-4 * norm)


def test_7_attention_runs_over_images_not_over_heads():
  """Heads are chosen by what all regions look at; here none is."""
  model, params = initialised('castle')
  rng = np.random.default_rng(2)
  regions = jnp.asarray(rng.normal(size=(2, 3, 14, 8)), jnp.float32)
  bias = jnp.asarray(rng.normal(size=(2, 3, 3)), jnp.float32)

  @jax.jit
  @jax.jacobian
  def influence(regions):
    return model.bind({'params': params}).bcp(
      regions, batch(jnp.ones(3, bool), bias=bias)
    )[0][1, :, 5]

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
  _, foreign = run(images, Context(alone['regions'], ~VALID))
  np.testing.assert_array_equal(foreign['context'], foreign['solo'])
  np.testing.assert_allclose(foreign['solo'], alone['solo'], atol=1e-6)


def test_batch_and_memory_switch_by_mask(run, images):
  """Context dropout: the masks of one joint context choose the mode."""
  _, gallery = run(images[::-1] + 0.1, solo)
  memory = Context(gallery['regions'], VALID.at[1].set(False))
  nobody = memory._replace(valid=~VALID)
  _, alone = run(images, solo)
  for joint, expected in (
    (batch(VALID, memory=nobody), run(images, batch(VALID))[0]),
    (batch(~VALID, memory=memory), run(images, memory)[0]),
    (batch(~VALID, memory=nobody), alone['solo']),
  ):
    embeddings, out = run(images, joint)
    np.testing.assert_allclose(embeddings, expected, atol=5e-6)
  np.testing.assert_array_equal(embeddings, out['solo'])


def test_images_that_ask_together_do_not_meet(run, images):
  model, params = initialised('castle')
  _, gallery = run(images, solo)

  @jax.jit
  @jax.grad
  def gradient(images, memory):
    embeddings, _ = model.apply({'params': params}, images, context=memory)
    return jnp.sum(embeddings[1] ** 3)

  memory = Context(gallery['regions'][:, 2:], VALID[2:])
  found = np.abs(np.asarray(gradient(images, memory))).max((1, 2, 3))
  assert found[1] > 0
  assert np.all(np.delete(found, 1) == 0)


@functools.cache
def objective_gradient():
  """Gradient of the objective by parameters, in the context of the batch."""
  model, _ = initialised('castle')
  terms = losses.castle_losses(losses.supervised_contrastive)

  def objective(params, images, context_valid, valid):
    _, out = model.apply(
      {'params': params},
      images,
      context=batch(context_valid),
      rngs={'dropout': jax.random.key(5)},
    )
    return losses.total_loss(terms, out, {'label': LABELS, 'valid': valid})

  return jax.jit(jax.value_and_grad(objective, has_aux=True))


def test_every_parameter_has_a_gradient_of_the_objective(images):
  _, params = initialised('castle')
  (_, values), gradient = objective_gradient()(params, images, VALID, VALID)
  assert {'effect', 'acyclicity', 'sparsity'} < set(values)
  assert all(value > 0 for value in values.values())
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.abs(np.asarray(leaf)).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize('padding', [False, True])
def test_without_anybody_to_see_the_gradient_is_finite(images, padding):
  _, params = initialised('castle')
  valid = VALID & (not padding)
  (total, values), gradient = objective_gradient()(
    params, images, ~VALID, valid
  )
  chex.assert_tree_all_finite((total, gradient))
  assert values['acyclicity'] == values['sparsity'] == 0
  for leaf in jax.tree.leaves((gradient['graph'], gradient['bcp'])):
    assert np.all(np.asarray(leaf) == 0)
  moved = max(np.abs(x).max() for x in jax.tree.leaves(gradient['backbone']))
  assert (moved > 0) == (not padding)


def test_the_contrast_needs_a_key(run, images):
  model, params = initialised('castle')
  _, out = run(images, batch(VALID))
  assert 'counterfactual' not in out

  @jax.jit
  def contrasted(valid):
    return model.apply(
      {'params': params},
      images,
      context=batch(valid),
      rngs={'dropout': jax.random.key(5)},
    )

  embeddings, told = contrasted(VALID)
  np.testing.assert_allclose(embeddings, out['context'], atol=2e-6)
  found = told['counterfactual']
  np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), 1, atol=1e-5)
  assert np.abs(found - embeddings).max() > 1e-3
  embeddings, told = contrasted(~VALID)
  np.testing.assert_array_equal(told['counterfactual'], embeddings)
  np.testing.assert_array_equal(told['counterfactual'], told['solo'])


def best_two(scores):
  """Factors of the best two of four heads, in NumPy."""
  order = np.argsort(-np.asarray(scores), axis=-1)
  factors = np.zeros(scores.shape)
  np.put_along_axis(factors, order[:, :2], 2.0, axis=-1)
  return factors


def test_heads_that_look_along_the_graph_are_kept(run, images):
  _, out = run(images, batch(VALID))
  heads = out['aux']['bcp']['heads']
  attention = np.asarray(out['attention'], np.float64).mean(axis=1)
  influence = np.asarray(out['aux']['graph']['influence'], np.float64)
  scores = np.einsum('lhnm,lnm->nh', attention, influence)
  np.testing.assert_array_equal(heads, best_two(scores))
  assert len(np.unique(heads, axis=0)) > 1
  for nobody in (batch(~VALID), Context(out['regions'], ~VALID)):
    heads = run(images, nobody)[1]['aux']['bcp']['heads']
    np.testing.assert_array_equal(heads, np.ones((8, 4)))


def prompt_shares(params, levels, prompt):
  """How much each head of MSW looks at the prompt, in float64."""
  shares = []
  for i, grid in enumerate(levels):
    p = jax.tree.map(
      lambda x: np.asarray(x, np.float64), params['msw'][f'level_{i}']
    )
    n, side, _, channels = grid.shape
    tokens = np.asarray(grid, np.float64).reshape(n, side * side, channels)
    tokens = tokens @ p['project']['kernel'] + p['project']['bias']
    tokens = normalized(tokens, **p['norm'])
    q, k, _ = np.split(tokens @ p['qkv']['kernel'] + p['qkv']['bias'], 3, -1)
    q, k = (x.reshape(n, side * side, 4, 2) for x in (q, k))
    weights = softmax(np.einsum('nthd,nshd->nhts', q, k) / np.sqrt(2))
    inside = np.repeat(np.repeat(prompt, side // 4, 1), side // 4, 2)
    inside = inside.reshape(n, 1, 1, side * side)
    shares.append((weights * inside).sum(axis=-1).mean(axis=-1))
  return np.mean(shares, axis=0)


def test_a_prompt_chooses_the_heads_that_look_at_it(images, rng):
  model, params = initialised('castle')

  @jax.jit
  def prompted(prompt):
    _, out = model.apply(
      {'params': params}, images, context=batch(VALID), prompt=prompt
    )
    bound = model.bind({'params': params})
    levels = bound.backbone(images, train=False)
    heads = out['aux']['bcp']['heads']
    again, _ = bound.refine(out['regions'], context=batch(VALID), heads=heads)
    return out, levels, again

  prompt = rng.random((8, 4, 4)) < 0.2
  prompt[:, 1, 1] = True
  out, levels, again = prompted(jnp.asarray(prompt))
  expected = prompt_shares(params, levels, prompt)
  np.testing.assert_allclose(out['aux']['msw']['prompt'], expected, atol=1e-5)
  np.testing.assert_array_equal(out['aux']['bcp']['heads'], best_two(expected))
  np.testing.assert_allclose(out['context'], again, atol=2e-6)
  other, _, _ = prompted(jnp.asarray(~prompt))
  changed = np.any(
    other['aux']['bcp']['heads'] != out['aux']['bcp']['heads'], axis=-1
  )
  assert changed.any()
  # Heads of MSW are chosen as well, which solo embeddings show.
  apart = np.abs(other['solo'] - out['solo']).max(axis=-1)
  assert np.all(apart[changed] > 1e-4)
  np.testing.assert_allclose(apart[~changed], 0, atol=1e-6)


def test_a_prompt_needs_heads_to_choose(images):
  init = functools.partial(
    make_model('msba').init, prompt=jnp.ones((8, 16, 16), bool)
  )
  with pytest.raises(ValueError, match='the model needs `join` and'):
    jax.eval_shape(init, jax.random.key(0), images)


def test_factors_of_heads_need_parts_to_join(images):
  model, regions = make_model('msba'), jnp.zeros((2, len(images), 4, 8))
  refine = functools.partial(
    model.init, heads=jnp.ones((len(images), 2)), method='refine'
  )
  with pytest.raises(ValueError, match='needs `join`'):
    jax.eval_shape(refine, jax.random.key(0), regions)


@functools.cache
def names_and_random(model):
  """Names of parameters, and random ones; nothing is compiled."""
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((2, 16, 16, 3))
  )['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes
  )
  paths = jax.tree_util.tree_leaves_with_path(shapes)
  return {jax.tree_util.keystr(path) for path, _ in paths}, params


# By what the names of the parameters begin that are not there.
REMOVED = {
  'gate': "['graph']['gate",
  'graph': ("['graph']", "['join']", "['cfi']['level_trust']"),
  'counterfactual': "['bcp']['reweigh']",
  'effect': (),
  'heads': "['join']",
}


@pytest.mark.parametrize('part', REMOVED)
def test_each_part_can_be_left_out(images, part):
  model = castle(
    ConvNet(TINY),
    features=8,
    embedding=6,
    num_heads=4,
    num_classes=5,
    width=8,
    **{part: False},
  )
  every, _ = names_and_random(make_model('castle'))
  names, params = names_and_random(model)
  of_windows = {
    f"['msw']['level_{i}']['{layer}']['{name}']"
    for i in range(2)
    for layer, own in (('out', 'kernel'), ('norm_regions', 'scale'))
    for name in (own, 'bias')
  }
  gone = {name for name in every if name.startswith(REMOVED[part])}
  gone -= {"['graph']['scale']"}  # the content graph has it as well
  assert every - names == gone
  assert bool(gone) == (part != 'effect')
  assert names - every == (of_windows if part in ('graph', 'heads') else set())

  embeddings, out = jax.jit(
    lambda params: model.apply(
      {'params': params},
      images,
      context=batch(VALID),
      rngs={'dropout': jax.random.key(0)},
    )
  )(params)
  chex.assert_tree_all_finite(out)
  np.testing.assert_allclose(jnp.linalg.norm(embeddings, axis=-1), 1, atol=1e-4)
  np.testing.assert_allclose(np.sum(out['attention'], -1), 1, atol=1e-5)
  assert ('counterfactual' in out) == (part != 'effect')
  assert ('graph' in out['aux']['graph']) == (part != 'graph')
  assert ('heads' in out['aux']['bcp']) == (part not in ('graph', 'heads'))
  # What is not there is a term that has to be left out.
  weights = {'effect': {'effect': 0.0}}.get(part, {})
  if part == 'graph':
    weights = {'acyclicity': 0.0, 'sparsity': 0.0}
  labelled = {'label': LABELS, 'valid': VALID}
  terms = losses.castle_losses(losses.nt_xent, **weights)
  assert np.isfinite(losses.total_loss(terms, out, labelled)[0])
  if weights:
    with pytest.raises(ValueError, match=r'build (it|the model) with'):
      losses.total_loss(losses.castle_losses(losses.nt_xent), out, labelled)


def test_half_of_an_odd_number_of_heads():
  with pytest.raises(ValueError, match='num_heads=3 must be even'):
    castle(ConvNet(TINY), num_heads=3)
  for switch in ({'heads': False}, {'graph': False}):
    model = castle(ConvNet(TINY), features=6, num_heads=3, **switch)
    assert model.bcp.keep_heads is None
    assert model.join is None
