"""The Swin Transformer against the one of transformers, block by block.

Every tensor there is random, saved under the names of published files, and
read by the table of names. Both compute in float32.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from msba_jax.models.backbones import swin
from msba_jax.training.import_weights import import_weights
from msba_jax.training.pretrained import load_pretrained

with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from transformers.core_model_loading import revert_weight_conversion

pytestmark = pytest.mark.filterwarnings('ignore')
SPEC = swin.SwinSpec(8, (2, 3, 2), (2, 1, 4), window=3, patch=2)


def their_model(rng):
  model = transformers.SwinModel(
    transformers.SwinConfig(
      image_size=24,
      patch_size=SPEC.patch,
      embed_dim=SPEC.features,
      depths=SPEC.blocks,
      num_heads=SPEC.num_heads,
      window_size=SPEC.window,
      mlp_ratio=SPEC.ratio,
    )
  ).eval()
  for name, tensor in model.named_parameters():
    values = rng.normal(size=tensor.shape)
    if 'norm' in name and name.endswith('weight'):
      values = 1 + 0.3 * values
    elif tensor.ndim > 1 and 'table' not in name:
      values = values / np.sqrt(tensor[0].numel())
    else:
      values = 0.5 * values
    tensor.data = torch.tensor(values, dtype=torch.float32)
  return model


def converted(model, folder):
  model.save_pretrained(folder)
  import_weights(folder / 'model.safetensors', folder / 'weights')
  found = load_pretrained(folder / 'weights')
  assert found.backbone == SPEC
  assert not found.left_out
  return jax.tree.map(jnp.asarray, found.parts['backbone'])


def their_states(model, images):
  """Grids by the names of our modules, and by level as they are returned."""
  found = {}

  def keep(name):
    def hook(module, inputs, outputs):
      outputs = outputs[0] if isinstance(outputs, tuple) else outputs
      found[name] = outputs.numpy()

    return hook

  model.embeddings.norm.register_forward_hook(keep('norm_patch'))
  for i, layer in enumerate(model.encoder.layers):
    for j, block in enumerate(layer.blocks):
      block.register_forward_hook(keep(f'stage_{i}_{j}'))
    if layer.downsample is not None:
      layer.downsample.register_forward_hook(keep(f'merge_{i + 1}'))
  with torch.no_grad():
    pixels = torch.tensor(np.moveaxis(images, -1, 1))
    last = f'norm_{len(SPEC.blocks) - 1}'
    found[last] = model(pixels).last_hidden_state.numpy()
  for i, blocks in enumerate(SPEC.blocks[:-1]):
    # The published model has no norm here: ours begins without an effect.
    grid = torch.tensor(found[f'stage_{i}_{blocks - 1}'])
    found[f'norm_{i}'] = torch.nn.functional.layer_norm(
      grid, grid.shape[-1:], eps=1e-5
    ).numpy()
  return found


@pytest.mark.parametrize(
  ('height', 'width'),
  [
    # Grids of 12 × 12, 6 × 6 and 3 × 3: shifted, then one window.
    (24, 24),
    # 9 × 11, 5 × 6 and 3 × 3: patches, windows and pairs are padded.
    (17, 21),
    # 9 × 24, 5 × 12 and 3 × 6: a side as large as the window is not shifted.
    (17, 47),
  ],
)
def test_every_block_equals_theirs(rng, tmp_path, height, width):
  model = their_model(rng)
  variables = converted(model, tmp_path)
  images = rng.normal(size=(2, height, width, 3)).astype(np.float32)
  expected = their_states(model, images)
  levels, state = jax.jit(
    lambda variables, images: swin.Swin(SPEC).apply(
      variables,
      images,
      capture_intermediates=lambda module, _: len(module.path) == 1,
    )
  )(variables, jnp.asarray(images))
  found = {
    name: np.asarray(calls['__call__'][0])
    for name, calls in state['intermediates'].items()
  }
  assert set(found) - set(expected) == {'patch'}
  for name, theirs in expected.items():
    ours = found[name].reshape(theirs.shape)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4, err_msg=name)
  for i, level in enumerate(levels):
    np.testing.assert_array_equal(level, found[f'norm_{i}'])


def test_the_published_file_has_these_names_and_shapes():
  # The defaults are those of microsoft/swin-tiny-patch4-window7-224.
  with torch.device('meta'):
    model = transformers.SwinForImageClassification(transformers.SwinConfig())
  source = revert_weight_conversion(model, model.state_dict())
  spec = swin.VARIANTS['swin_tiny']
  shapes = traverse_util.flatten_dict(
    jax.eval_shape(
      swin.Swin(spec).init,
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),
    )
  )
  used = set()
  for tensor in swin.swin_names(spec):
    used.update(tensor.sources)
    arrays = [
      np.broadcast_to(np.float32(0), tuple(source[name].shape))
      for name in tensor.sources
    ]
    assert tensor.convert(*arrays).shape == shapes.pop(tensor.path).shape
  assert not shapes
  assert set(source) - used == {'classifier.weight', 'classifier.bias'}
