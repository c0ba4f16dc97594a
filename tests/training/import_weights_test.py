"""Tests of importing published checkpoints; torch is not needed."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from msba_jax import cli
from msba_jax.data.errors import InputError
from msba_jax.models.backbones.vit import ViT
from msba_jax.training.import_weights import import_weights
from msba_jax.training.pretrained import load_pretrained

D = 8


def linear(name, out, features=D):
  return {f'{name}.weight': (out, features), f'{name}.bias': (out,)}


def norm(name):
  return {f'{name}.weight': (D,), f'{name}.bias': (D,)}


def shapes_of(family):
  """Names and shapes of a tiny checkpoint, as they are published."""
  if family == 'vit':
    stem, block, d = 'embeddings.', 'encoder.layer.0.', D
    attention = {}
    for name in ('query', 'key', 'value'):
      attention |= linear(f'{block}attention.attention.{name}', d)
    return {
      f'{stem}cls_token': (1, 1, d),
      f'{stem}position_embeddings': (1, 5, d),
      f'{stem}patch_embeddings.projection.weight': (d, 3, 4, 4),
      f'{stem}patch_embeddings.projection.bias': (d,),
      **attention,
      **linear(f'{block}attention.output.dense', d),
      **norm(f'{block}layernorm_before'),
      **norm(f'{block}layernorm_after'),
      **linear(f'{block}intermediate.dense', 4 * d),
      **linear(f'{block}output.dense', d, 4 * d),
      **norm('layernorm'),
      **linear('pooler.dense', d),
    }
  tower, head = 'vision_model.', 'vision_model.head.'
  return {
    f'{tower}embeddings.patch_embedding.weight': (D, 3, 4, 4),
    f'{tower}embeddings.patch_embedding.bias': (D,),
    f'{tower}embeddings.position_embedding.weight': (4, D),
    **layers(tower),
    **norm(f'{tower}post_layernorm'),
    f'{head}probe': (1, 1, D),
    f'{head}attention.in_proj_weight': (3 * D, D),
    f'{head}attention.in_proj_bias': (3 * D,),
    **linear(f'{head}attention.out_proj', D),
    **norm(f'{head}layernorm'),
    **linear(f'{head}mlp.fc1', 4 * D),
    **linear(f'{head}mlp.fc2', D, 4 * D),
    'text_model.embeddings.token_embedding.weight': (11, D),
    'text_model.embeddings.position_embedding.weight': (6, D),
    **layers('text_model.'),
    **norm('text_model.final_layer_norm'),
    **linear('text_model.head', D),
    'logit_scale': (1,),
    'logit_bias': (1,),
  }


def layers(tower):
  block = f'{tower}encoder.layers.0.'
  shapes = {}
  for name in 'qkv':
    shapes |= linear(f'{block}self_attn.{name}_proj', D)
  return {
    **shapes,
    **linear(f'{block}self_attn.out_proj', D),
    **norm(f'{block}layer_norm1'),
    **norm(f'{block}layer_norm2'),
    **linear(f'{block}mlp.fc1', 4 * D),
    **linear(f'{block}mlp.fc2', D, 4 * D),
  }


def checkpoint(rng, family='vit'):
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes_of(family).items()
  }


@pytest.fixture
def saved(tmp_path):
  """Writes tensors to a file and gives its path."""

  def save(tensors, name='model.safetensors'):
    save_file(tensors, tmp_path / name)
    return tmp_path / name

  return save


def test_what_is_imported_is_what_is_loaded(rng, saved, tmp_path):
  tensors = checkpoint(rng)
  written = import_weights(saved(tensors), tmp_path / 'weights')
  loaded = load_pretrained(tmp_path / 'weights')
  assert loaded.family == 'vit'
  assert loaded.left_out == ('pooler.dense.bias', 'pooler.dense.weight')
  for field in ('backbone', 'text', 'preprocessing', 'left_out'):
    assert getattr(loaded, field) == getattr(written, field)
  params = loaded.parts['backbone']['params']
  first = tensors['embeddings.cls_token'][0, 0]
  position = tensors['embeddings.position_embeddings'][0]
  np.testing.assert_allclose(params['prefix'][0], first + position[0])
  np.testing.assert_array_equal(params['position'].reshape(4, D), position[1:])
  np.testing.assert_array_equal(
    params['block_0']['attention']['qkv']['kernel'][:, D : 2 * D],
    tensors['encoder.layer.0.attention.attention.key.weight'].T,
  )
  images = jnp.asarray(rng.normal(size=(1, 8, 8, 3)), jnp.float32)
  variables = jax.tree.map(jnp.asarray, loaded.parts['backbone'])
  (grid,) = ViT(loaded.backbone).apply(variables, images)
  assert grid.shape == (1, 2, 2, D)


def test_both_towers_are_imported(rng, saved, tmp_path):
  found = import_weights(saved(checkpoint(rng, 'siglip')), tmp_path / 'w')
  assert found.family == 'siglip'
  assert set(found.parts) == {'backbone', 'image_head', 'text', 'logits'}
  assert found.text is not None
  assert (found.text.vocabulary, found.text.length) == (11, 6)
  assert found.text.pooled == 'last'
  assert not found.backbone.class_token


def test_a_root_that_a_classifier_brought_is_taken_off(rng, saved, tmp_path):
  tensors = {
    f'vit.{name}': x
    for name, x in checkpoint(rng).items()
    if not name.startswith('pooler')
  } | {'classifier.weight': np.zeros((3, D), np.float32)}
  found = import_weights(saved(tensors), tmp_path / 'w')
  assert found.left_out == ('classifier.weight',)


def test_half_precision_becomes_float32(rng, saved, tmp_path):
  tensors = {
    name: x.astype(ml_dtypes.bfloat16) for name, x in checkpoint(rng).items()
  }
  # The writer for NumPy does not know bfloat16.
  from safetensors.flax import save_file as save_flax

  path = tmp_path / 'half.safetensors'
  save_flax({k: jnp.asarray(v) for k, v in tensors.items()}, path)
  found = import_weights(path, tmp_path / 'w')
  scale = found.parts['backbone']['params']['norm']['scale']
  assert scale.dtype == np.float32
  np.testing.assert_array_equal(
    scale, tensors['layernorm.weight'].astype(np.float32)
  )


def test_configs_beside_the_file_are_read(rng, saved, tmp_path):
  path = saved(checkpoint(rng))
  (tmp_path / 'config.json').write_text(
    json.dumps(
      {
        'num_attention_heads': 4,
        'hidden_act': 'quick_gelu',
        'layer_norm_eps': 1e-3,
      }
    )
  )
  (tmp_path / 'preprocessor_config.json').write_text(
    json.dumps(
      {
        'size': {'shortest_edge': 16},
        'do_center_crop': True,
        'crop_size': {'height': 12, 'width': 12},
        'image_mean': [0.1, 0.2, 0.3],
        'image_std': [1, 2, 3],
        'resample': 3,
      }
    )
  )
  found = import_weights(path, tmp_path / 'w')
  assert found.backbone.num_heads == 4
  assert found.backbone.activation == 'quick_gelu'
  assert found.backbone.epsilon == 1e-3
  assert found.preprocessing.size == 12
  assert found.preprocessing.mean == (0.1, 0.2, 0.3)
  assert found.preprocessing.std == (1.0, 2.0, 3.0)
  assert found.preprocessing.interpolation == 'bicubic'


def _missing(tensors):
  del tensors['encoder.layer.0.output.dense.bias']


def _extra(tensors):
  tensors['encoder.layer.0.gate.weight'] = np.zeros((2, 2), np.float32)


def _shape(tensors):
  tensors['layernorm.bias'] = np.zeros(D + 1, np.float32)


def _not_finite(tensors):
  tensors['layernorm.bias'][2] = np.nan


def _integers(tensors):
  tensors['layernorm.bias'] = np.zeros(D, np.int32)


def _no_square(tensors):
  tensors['embeddings.position_embeddings'] = np.zeros((1, 6, D), np.float32)


def _other_names(tensors):
  for name in list(tensors):
    tensors[f'net.{name}'] = tensors.pop(name)


@pytest.mark.parametrize(
  ('spoil', 'said'),
  [
    (_missing, 'encoder.layer.0.output.dense.bias is missing'),
    (_extra, 'no place in a vit model: encoder.layer.0.gate.weight'),
    (_shape, r'layernorm.bias \(9,\) gives \(9,\); params/norm/bias'),
    (_not_finite, 'layernorm.bias holds numbers that are not finite'),
    (_integers, 'layernorm.bias holds int32'),
    (_no_square, 'position_embeddings is for no square'),
    (_other_names, 'no known family has such tensor names'),
  ],
)
def test_a_wrong_checkpoint_is_named_and_changes_nothing(
  rng, saved, tmp_path, spoil, said
):
  goal = tmp_path / 'weights'
  import_weights(saved(checkpoint(rng)), goal)
  before = (goal / 'manifest.json').read_bytes()
  tensors = checkpoint(rng)
  spoil(tensors)
  with pytest.raises(InputError, match=said):
    import_weights(saved(tensors), goal)
  assert (goal / 'manifest.json').read_bytes() == before
  load_pretrained(goal)


@pytest.mark.parametrize(
  ('file', 'text', 'said'),
  [
    ('config.json', '{"hidden_act": "swish"}', "hidden_act='swish'"),
    ('config.json', '{"num_attention_heads": 3}', '3 heads do not divide'),
    ('config.json', '[1]', 'holds no JSON object'),
    ('config.json', '{', 'cannot be read'),
    ('preprocessor_config.json', '{"resample": 5}', 'resample=5'),
    ('preprocessor_config.json', '{"image_mean": 1}', 'image_mean must be 3'),
    ('preprocessor_config.json', '{"size": 10}', 'no multiple of patches'),
  ],
)
def test_a_config_that_cannot_be_used_is_named(
  rng, saved, tmp_path, file, text, said
):
  path = saved(checkpoint(rng))
  (tmp_path / file).write_text(text)
  with pytest.raises(InputError, match=said):
    import_weights(path, tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
  'content', [b'\x80\x02}q\x00.', b'PK\x03\x04' + bytes(60), b'']
)
def test_a_pickle_is_never_read(tmp_path, content):
  path = tmp_path / 'pytorch_model.bin'
  path.write_bytes(content)
  with pytest.raises(InputError, match='is never read'):
    import_weights(path, tmp_path / 'w')


def test_the_command_says_what_it_made(rng, saved, tmp_path, capsys):
  path, goal = saved(checkpoint(rng)), tmp_path / 'weights'
  assert cli.main(['import-weights', str(path), str(goal)]) == 0
  said = capsys.readouterr().out
  assert 'vit weights stand in' in said
  assert 'Left out: pooler.dense.bias, pooler.dense.weight.' in said
  wrong = ['import-weights', str(path), str(goal), '--family', 'clip']
  assert cli.main(wrong) == 2
  assert 'vision_model.embeddings' in capsys.readouterr().err
  assert cli.main(['import-weights', str(tmp_path / 'no'), str(goal)]) == 2
  assert 'does not exist' in capsys.readouterr().err


def test_broken_weights_are_refused(rng, saved, tmp_path):
  goal = tmp_path / 'weights'
  with pytest.raises(InputError, match='do not exist'):
    load_pretrained(goal)
  import_weights(saved(checkpoint(rng)), goal)
  data = bytearray((goal / 'arrays.npz').read_bytes())
  data[len(data) // 2] ^= 1
  (goal / 'arrays.npz').write_bytes(data)
  with pytest.raises(InputError, match='msba import-weights'):
    load_pretrained(goal)
