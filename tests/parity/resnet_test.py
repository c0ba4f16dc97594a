"""The ResNet against the one of transformers, block by block.

Every tensor there is random, saved under the names of published files, and
read by the table of names. Both compute in float32.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from msba_jax.models.backbones import resnet
from msba_jax.training.import_weights import import_weights
from msba_jax.training.pretrained import load_pretrained

with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.filterwarnings('ignore')
SPEC = resnet.ResNetSpec((2, 1, 2), (16, 32, 24), stem=8)


def their_model(rng):
  model = transformers.ResNetModel(
    transformers.ResNetConfig(
      embedding_size=SPEC.stem, hidden_sizes=SPEC.widths, depths=SPEC.blocks
    )
  ).eval()
  for name, tensor in model.state_dict().items():
    values = rng.normal(size=tensor.shape)
    if name.endswith('num_batches_tracked'):
      continue
    if name.endswith('running_var'):
      values = 0.5 + np.abs(values)
    elif tensor.ndim > 1:
      values = values / np.sqrt(tensor[0].numel())
    elif name.endswith('weight'):
      values = 0.7 + 0.2 * values
    else:
      values = 0.5 * values
    tensor.copy_(torch.tensor(values))
  return model


def converted(model, folder):
  model.save_pretrained(folder)
  import_weights(folder / 'model.safetensors', folder / 'weights')
  found = load_pretrained(folder / 'weights')
  assert found.backbone == SPEC
  assert all(x.endswith('num_batches_tracked') for x in found.left_out)
  return jax.tree.map(jnp.asarray, found.parts['backbone'])


def their_states(model, images):
  """Grids by the names of our modules."""
  found = {}

  def keep(name):
    def hook(module, inputs, outputs):
      found[name] = np.moveaxis(outputs.numpy(), 1, -1)

    return hook

  for i, stage in enumerate(model.encoder.stages):
    for j, block in enumerate(stage.layers):
      block.register_forward_hook(keep(f'stage_{i}_{j}'))
  with torch.no_grad():
    model(torch.tensor(np.moveaxis(images, -1, 1)))
  return found


@pytest.mark.parametrize(('height', 'width'), [(32, 32), (37, 50)])
def test_every_block_equals_theirs(rng, tmp_path, height, width):
  model = their_model(rng)
  variables = converted(model, tmp_path)
  images = rng.normal(size=(2, height, width, 3)).astype(np.float32)
  expected = their_states(model, images)
  levels, state = jax.jit(
    lambda variables, images: resnet.ResNet(SPEC).apply(
      variables,
      images,
      capture_intermediates=lambda module, _: isinstance(
        module, resnet.Bottleneck
      ),
    )
  )(variables, jnp.asarray(images))
  found = {
    name: np.asarray(calls['__call__'][0])
    for name, calls in state['intermediates'].items()
  }
  assert set(found) == set(expected)
  for name, theirs in expected.items():
    np.testing.assert_allclose(
      found[name], theirs, rtol=0, atol=1e-4, err_msg=name
    )
  for i, level in enumerate(levels):
    last = f'stage_{i}_{SPEC.blocks[i] - 1}'
    np.testing.assert_array_equal(level, found[last])


def test_the_published_file_has_these_names_and_shapes():
  # The defaults are those of microsoft/resnet-50.
  with torch.device('meta'):
    model = transformers.ResNetForImageClassification(
      transformers.ResNetConfig()
    )
  source = model.state_dict()
  spec = resnet.VARIANTS['resnet_50']
  shapes = traverse_util.flatten_dict(
    jax.eval_shape(
      resnet.ResNet(spec).init,
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),
    )
  )
  used = set()
  for tensor in resnet.resnet_names(spec):
    used.update(tensor.sources)
    arrays = [
      np.broadcast_to(np.float32(0), tuple(source[name].shape))
      for name in tensor.sources
    ]
    assert tensor.convert(*arrays).shape == shapes.pop(tensor.path).shape
  assert not shapes
  left = {
    name for name in source if not name.endswith('num_batches_tracked')
  } - used
  assert left == {'classifier.1.weight', 'classifier.1.bias'}
