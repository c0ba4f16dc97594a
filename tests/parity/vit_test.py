"""ViT, DINOv2, CLIP and SigLIP against the `transformers` library.

Every tensor is refilled with random numbers: at their initial values many are
alike, and an exchange of two would not be seen.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from msba_jax.models.backbones.text import VARIANTS as TEXTS  # noqa: E402
from msba_jax.models.backbones.text import TextSpec, TextTower  # noqa: E402
from msba_jax.models.backbones.vit import VARIANTS, ViT, ViTSpec  # noqa: E402
from msba_jax.models.published import (  # noqa: E402
  LEFT_OUT,
  recognise_family,
  text_spec,
  vit_spec,
)
from msba_jax.models.vit_names import (  # noqa: E402
  image_head_tensors,
  logit_tensors,
  text_tensors,
  vit_tensors,
)
from msba_jax.models.weights import convert_tensors  # noqa: E402
from msba_jax.training.import_weights import import_weights  # noqa: E402
from msba_jax.training.pretrained import (  # noqa: E402
  image_tower,
  load_pretrained,
)

SMALL = {
  'hidden_size': 12,
  'num_hidden_layers': 3,
  'num_attention_heads': 3,
  'image_size': 16,
  'patch_size': 4,
}
SPEC = ViTSpec(12, 3, 3, patch=4, image=16)
TEXT = {
  'hidden_size': 8,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 20,
  'vocab_size': 30,
  'max_position_embeddings': 7,
}
TOLERANCE = 1e-4


def refilled(model, seed=0):
  """The model with random numbers in all tensors, and its saved tensors."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for tensor in model.state_dict().values():
      if tensor.is_floating_point():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
  return model.eval()


def converted(module, tensors, table, *inputs):
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  variables, used = convert_tensors(tensors, table, shapes)
  return jax.tree.map(jnp.asarray, variables), used


def pixels(rng, height, width):
  return jnp.asarray(rng.standard_normal((2, height, width, 3), np.float32))


def theirs(images):
  return torch.from_numpy(np.array(images).transpose(0, 3, 1, 2))


MODELS = {
  'vit': lambda: (
    transformers.ViTModel(
      transformers.ViTConfig(**SMALL, intermediate_size=20),
      add_pooling_layer=False,
    ),
    dataclasses.replace(SPEC, hidden=20, epsilon=1e-12),
    'vit',
  ),
  'dinov2': lambda: (
    transformers.Dinov2Model(
      transformers.Dinov2Config(**SMALL, use_mask_token=False)
    ),
    dataclasses.replace(SPEC, layer_scale=1.0),
    'dinov2',
  ),
  'dinov2 with a gate': lambda: (
    transformers.Dinov2Model(
      transformers.Dinov2Config(
        **SMALL, use_mask_token=False, use_swiglu_ffn=True
      )
    ),
    dataclasses.replace(
      SPEC, hidden=32, layer_scale=1.0, activation='silu', gated=True
    ),
    'dinov2',
  ),
  'dinov2 with registers': lambda: (
    transformers.Dinov2WithRegistersModel(
      transformers.Dinov2WithRegistersConfig(**SMALL)
    ),
    dataclasses.replace(SPEC, layer_scale=1.0, registers=4, antialias=True),
    'dinov2',
  ),
}


@pytest.mark.parametrize('size', [(16, 16), (24, 12), (8, 8)])
@pytest.mark.parametrize('name', MODELS)
def test_every_hidden_state_is_that_of_transformers(rng, tmp_path, name, size):
  model, spec, family = MODELS[name]()
  refilled(model).save_pretrained(tmp_path)
  import_weights(tmp_path / 'model.safetensors', tmp_path / 'weights')
  found = load_pretrained(tmp_path / 'weights')
  assert (found.family, found.backbone) == (family, spec)
  assert set(found.left_out) <= {'embeddings.mask_token'}
  variables = jax.tree.map(jnp.asarray, found.parts['backbone'])
  images = pixels(rng, *size)
  module = ViT(spec)
  more = {'interpolate_pos_encoding': True} if family == 'vit' else {}
  with torch.no_grad():
    result = model(theirs(images), output_hidden_states=True, **more)
  ours = jax.jit(lambda *x: module.apply(*x, method='encode'))(
    variables, images
  )
  assert len(ours.hidden) == len(result.hidden_states) == 4
  for own, other in zip(ours.hidden, result.hidden_states, strict=True):
    np.testing.assert_allclose(own, other, atol=TOLERANCE)
  np.testing.assert_allclose(
    ours.normalized, result.last_hidden_state, atol=TOLERANCE
  )


def language_image(name):
  vision = SMALL | {'intermediate_size': 20}
  if name == 'clip':
    model = transformers.CLIPModel(
      transformers.CLIPConfig(
        text_config=TEXT
        | {'eos_token_id': 29, 'bos_token_id': 1, 'pad_token_id': 29},
        vision_config=vision,
        projection_dim=6,
      )
    )
    spec = dataclasses.replace(
      SPEC,
      hidden=20,
      norm_before=True,
      patch_bias=False,
      activation='quick_gelu',
      epsilon=1e-5,
    )
    text = TextSpec(8, 2, 2, 30, 7, 6, hidden=20, end_token=29)
    return model, spec, text
  model = transformers.SiglipModel(
    transformers.SiglipConfig(
      text_config=TEXT
      | {
        'projection_size': 12,
        'eos_token_id': 29,
        'bos_token_id': 1,
        'pad_token_id': 0,
      },
      vision_config=vision,
    )
  )
  spec = dataclasses.replace(
    SPEC, hidden=20, class_token=False, activation='gelu_tanh'
  )
  text = TextSpec(
    8,
    2,
    2,
    30,
    7,
    12,
    hidden=20,
    causal=False,
    pooled='last',
    projection_bias=True,
    activation='gelu_tanh',
    epsilon=1e-6,
  )
  return model, spec, text


@pytest.mark.parametrize('size', [(16, 16), (24, 12)])
@pytest.mark.parametrize('name', ['clip', 'siglip'])
def test_images_and_texts_are_those_of_transformers(rng, tmp_path, name, size):
  model, spec, text_sizes = language_image(name)
  refilled(model).save_pretrained(tmp_path)
  import_weights(tmp_path / 'model.safetensors', tmp_path / 'weights')
  found = load_pretrained(tmp_path / 'weights')
  assert (found.backbone, found.text) == (spec, text_sizes)
  assert not found.left_out
  parts = jax.tree.map(jnp.asarray, found.parts)
  images = pixels(rng, *size)
  ids = rng.integers(2, 29, (3, 7))
  ids[0, 5:] = ids[1, 3:] = ids[2, 6:] = 29
  vit, text = ViT(spec), TextTower(text_sizes)
  variables, texts = parts['backbone'], parts['text']
  tower = image_tower(spec, name, 6)
  np.testing.assert_allclose(
    parts['logits']['params']['scale'], model.logit_scale.detach().squeeze()
  )
  with torch.no_grad():
    vision = model.vision_model(
      theirs(images), output_hidden_states=True, interpolate_pos_encoding=True
    )
    texts_result = model.text_model(
      torch.from_numpy(ids), output_hidden_states=True
    )
    image_features, text_features = (
      vision.pooler_output,
      texts_result.pooler_output,
    )
    if name == 'clip':
      image_features = model.visual_projection(image_features)
      text_features = model.text_projection(text_features)
  ours = vit.apply(variables, images, method='encode')
  assert len(ours.hidden) == len(vision.hidden_states)
  for own, other in zip(ours.hidden, vision.hidden_states, strict=True):
    np.testing.assert_allclose(own, other, atol=TOLERANCE)
  hidden = text.apply(texts, jnp.asarray(ids), method='hidden_states')
  assert len(hidden) == len(texts_result.hidden_states)
  for own, other in zip(hidden, texts_result.hidden_states, strict=True):
    np.testing.assert_allclose(own, other, atol=TOLERANCE)
  embedded = tower.apply(
    {'params': {'vit': variables['params']} | parts['image_head']['params']},
    images,
  )
  np.testing.assert_allclose(embedded, image_features, atol=TOLERANCE)
  np.testing.assert_allclose(
    text.apply(texts, jnp.asarray(ids)), text_features, atol=TOLERANCE
  )


def published(name):
  """A model as it is published, without memory for its numbers."""
  with torch.device('meta'):
    if name == 'clip_base_32':
      return transformers.CLIPModel(transformers.CLIPConfig()), 'clip'
    if name == 'siglip_base':
      return transformers.SiglipModel(transformers.SiglipConfig()), 'siglip'
    if name == 'vit_base':
      return transformers.ViTModel(transformers.ViTConfig()), 'vit'
    sizes = {'image_size': 518, 'patch_size': 14}
    if name == 'dinov2_base':
      return transformers.Dinov2Model(
        transformers.Dinov2Config(**sizes)
      ), 'dinov2'
    if name == 'dinov2_giant':
      giant = transformers.Dinov2Config(
        **sizes,
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        use_swiglu_ffn=True,
      )
      return transformers.Dinov2Model(giant), 'dinov2'
    return transformers.Dinov2WithRegistersModel(
      transformers.Dinov2WithRegistersConfig(**sizes)
    ), 'dinov2'


# What the library calls them in memory, and on disk.
ON_DISK = (
  (r'^layers\.', 'encoder.layer.'),
  (r'attention\.([qkv])_proj', r'attention.attention.\1'),
  (r'attention\.o_proj', 'attention.output.dense'),
)
LETTERS = {'q': 'query', 'k': 'key', 'v': 'value'}


def on_disk(name, family):
  if family in ('clip', 'siglip'):
    return name
  for pattern, other in ON_DISK:
    name = re.sub(pattern, other, name)
  name = re.sub(
    r'attention\.attention\.([qkv])\.',
    lambda x: f'attention.attention.{LETTERS[x[1]]}.',
    name,
  )
  if family == 'vit':
    name = name.replace('mlp.fc1', 'intermediate.dense')
    name = name.replace('mlp.fc2', 'output.dense')
  return name


def gates_joined(shapes):
  """Two layers of a gated feed-forward are one on disk."""
  joined = {}
  for name, shape in shapes.items():
    if 'mlp.gate_proj' in name:
      name = name.replace('gate_proj', 'weights_in')
      shape = (2 * shape[0], *shape[1:])
    if 'mlp.up_proj' not in name:
      joined[name.replace('mlp.down_proj', 'mlp.weights_out')] = shape
  return joined


@pytest.mark.parametrize(
  'name',
  [
    'vit_base',
    'dinov2_base',
    'dinov2_giant',
    'dinov2_base_registers',
    'clip_base_32',
    'siglip_base',
  ],
)
def test_published_shapes_are_those_of_our_variants(name):
  model, family = published(name)
  shapes = gates_joined(
    {
      on_disk(key, family): tuple(x.shape)
      for key, x in model.state_dict().items()
    }
  )
  assert recognise_family(shapes) == family
  spec = vit_spec(shapes, family)
  assert spec == VARIANTS[name]
  # One number stands for all of a tensor.
  tensors = {
    key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()
  }
  images = jax.ShapeDtypeStruct((1, spec.image, spec.image, 3), jnp.float32)
  _, used = converted(ViT(spec), tensors, vit_tensors(spec, family), images)
  if family in ('clip', 'siglip'):
    text = text_spec(shapes, family)
    assert text == TEXTS['clip_base' if family == 'clip' else 'siglip_base']
    ids = jax.ShapeDtypeStruct((1, text.length), jnp.int32)
    table = text_tensors(text, family)
    used |= converted(TextTower(text), tensors, table, ids)[1]
    for table in (image_head_tensors(family), logit_tensors(family)):
      used |= {source for entry in table for source in entry.sources}
  rest = set(shapes) - used
  assert all(LEFT_OUT.fullmatch(key) for key in rest), rest
