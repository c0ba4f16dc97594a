"""Names of vision transformers and text towers in published checkpoints.

The names are those that the `transformers` library writes.

Attributes:
  Family: whose checkpoints are known; Swin and ResNet have their names beside
    the modules.
  vit_tensors: the table of a `ViT`.
  image_head_tensors: the table of what an `ImageTower` adds to it.
  text_tensors: the table of a `TextTower`.
  logit_tensors: temperature and bias of image-text similarities.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from msba_jax.models.backbones.text import TextSpec
from msba_jax.models.backbones.vit import ViTSpec
from msba_jax.models.weight_names import (
  Tensor,
  conv_tensors,
  dense_tensors,
  identity,
  norm_tensors,
)

__all__ = [
  'Family',
  'image_head_tensors',
  'logit_tensors',
  'text_tensors',
  'vit_tensors',
]

Family = Literal['vit', 'dinov2', 'clip', 'siglip', 'swin', 'resnet']


class _Names(NamedTuple):
  """How a family calls the parts of a tower; `{i}` is the block."""

  block: str
  projections: tuple[str, ...]
  out: str
  norms: tuple[str, str]
  layers: tuple[str, str]
  norm: str


_SEPARATE = tuple(f'attention.attention.{x}' for x in ('query', 'key', 'value'))
_JOINED = tuple(f'self_attn.{x}_proj' for x in 'qkv')
_LANGUAGE_IMAGE = _Names(
  'encoder.layers.{i}.',
  _JOINED,
  'self_attn.out_proj',
  ('layer_norm1', 'layer_norm2'),
  ('mlp.fc1', 'mlp.fc2'),
  'vision_model.post_layernorm',
)
_NAMES = {
  'vit': _Names(
    'encoder.layer.{i}.',
    _SEPARATE,
    'attention.output.dense',
    ('layernorm_before', 'layernorm_after'),
    ('intermediate.dense', 'output.dense'),
    'layernorm',
  ),
  'dinov2': _Names(
    'encoder.layer.{i}.',
    _SEPARATE,
    'attention.output.dense',
    ('norm1', 'norm2'),
    ('mlp.fc1', 'mlp.fc2'),
    'layernorm',
  ),
  'clip': _LANGUAGE_IMAGE,
  'siglip': _LANGUAGE_IMAGE,
}


def vit_tensors(spec: ViTSpec, family: Family) -> Iterator[Tensor]:
  """The parameters of a `ViT`, those of the blocks as `block_0`, ….

  Args:
    spec: of the transformer.
    family: whose names.

  Yields:
    One entry a parameter.
  """
  names = _NAMES[family]
  if spec.gated:
    names = names._replace(layers=('mlp.weights_in', 'mlp.weights_out'))
  towers = family in ('clip', 'siglip')
  root = 'vision_model.' if towers else ''
  stem = f'{root}embeddings.'
  patch = 'patch_embedding' if towers else 'patch_embeddings.projection'
  yield from conv_tensors(stem + patch, ('patch',), bias=spec.patch_bias)
  position = 'position_embedding.weight' if towers else 'position_embeddings'
  yield Tensor((stem + position,), ('params', 'position'), _grid(spec))
  if spec.class_token:
    first = 'class_embedding' if towers else 'cls_token'
    sources = [stem + first, stem + position]
    if spec.registers:
      sources.append(f'{stem}register_tokens')
    yield Tensor(tuple(sources), ('params', 'prefix'), _prefix)
  if spec.norm_before:
    # The missing letter is in the published name.
    yield from norm_tensors(f'{root}pre_layrnorm', ('norm_before',))
  for i in range(spec.depth):
    block = root + names.block.format(i=i)
    yield from _block_tensors(block, f'block_{i}', names)
    if spec.layer_scale is not None:
      for j, branch in enumerate(('attention', 'feed_forward')):
        yield Tensor(
          (f'{block}layer_scale{j + 1}.lambda1',),
          ('params', f'block_{i}', f'scale_{branch}'),
          identity,
        )
  yield from norm_tensors(names.norm, ('norm',))


def image_head_tensors(family: Family) -> Iterator[Tensor]:
  """What an `ImageTower` adds to its `ViT`; nothing for other families."""
  if family == 'clip':
    yield from dense_tensors(
      ('visual_projection',), ('projection',), bias=False
    )
  if family != 'siglip':
    return
  head = 'vision_model.head.'
  yield Tensor((f'{head}probe',), ('params', 'pool', 'probe'), _rows)
  for path, part in (('query', slice(0, 1)), ('keys_values', slice(1, 3))):
    for kind, ours in (('weight', 'kernel'), ('bias', 'bias')):
      yield Tensor(
        (f'{head}attention.in_proj_{kind}',),
        ('params', 'pool', path, ours),
        _third(part),
      )
  yield from dense_tensors((f'{head}attention.out_proj',), ('pool', 'out'))
  yield from norm_tensors(f'{head}layernorm', ('pool', 'norm'))
  for theirs, ours in (('fc1', 'inner'), ('fc2', 'outer')):
    yield from dense_tensors(
      (f'{head}mlp.{theirs}',), ('pool', 'feed_forward', ours)
    )


def text_tensors(spec: TextSpec, family: Family) -> Iterator[Tensor]:
  """The parameters of a `TextTower`; arguments as `vit_tensors`."""
  names = _NAMES[family]
  root = 'text_model.'
  stem = f'{root}embeddings.'
  yield Tensor(
    (f'{stem}token_embedding.weight',),
    ('params', 'token', 'embedding'),
    identity,
  )
  yield Tensor(
    (f'{stem}position_embedding.weight',), ('params', 'position'), identity
  )
  for i in range(spec.depth):
    block = root + names.block.format(i=i)
    yield from _block_tensors(block, f'block_{i}', names)
  yield from norm_tensors(f'{root}final_layer_norm', ('norm',))
  head = 'text_projection' if family == 'clip' else f'{root}head'
  yield from dense_tensors((head,), ('projection',), bias=spec.projection_bias)


def logit_tensors(family: Family) -> Iterator[Tensor]:
  """Logarithm of the inverse temperature and, for SigLIP, the bias."""
  if family in ('clip', 'siglip'):
    yield Tensor(('logit_scale',), ('params', 'scale'), _scalar)
  if family == 'siglip':
    yield Tensor(('logit_bias',), ('params', 'bias'), _scalar)


def _block_tensors(block: str, ours: str, names: _Names) -> Iterator[Tensor]:
  """Attention, norms and feed-forward of one block."""
  qkv = tuple(block + x for x in names.projections)
  yield from dense_tensors(qkv, (ours, 'attention', 'qkv'))
  yield from dense_tensors((block + names.out,), (ours, 'attention', 'out'))
  for theirs, branch in zip(
    names.norms, ('attention', 'feed_forward'), strict=True
  ):
    yield from norm_tensors(block + theirs, (ours, f'norm_{branch}'))
  for theirs, layer in zip(names.layers, ('inner', 'outer'), strict=True):
    yield from dense_tensors((block + theirs,), (ours, 'feed_forward', layer))


def _grid(spec: ViTSpec):
  """Positions (1, places, d) or (places, d) as a grid, without the class."""

  def convert(table: np.ndarray) -> np.ndarray:
    table = _rows(table)[int(spec.class_token) :]
    side = spec.image // spec.patch
    return table.reshape(side, side, table.shape[-1])

  return convert


def _prefix(
  first: np.ndarray, position: np.ndarray, *registers: np.ndarray
) -> np.ndarray:
  """Class token with its position, then registers, which have none."""
  rows = [_rows(first) + _rows(position)[:1], *map(_rows, registers)]
  return np.concatenate(rows)


def _rows(array: np.ndarray) -> np.ndarray:
  """Vectors with any leading axes as (rows, d)."""
  return array.reshape(-1, array.shape[-1])


def _third(part: slice):
  """One or two of three linear layers that are stored as one."""

  def convert(stacked: np.ndarray) -> np.ndarray:
    thirds = np.split(stacked, 3)[part]
    return np.concatenate(thirds).T

  return convert


def _scalar(array: np.ndarray) -> np.ndarray:
  return array.reshape(())
