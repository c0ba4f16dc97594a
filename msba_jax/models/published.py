"""What a published checkpoint is: its family, and the sizes of its towers.

Sizes are read from the shapes of the tensors; what shapes do not tell (heads,
activation, epsilon) comes from the `config.json` that is published beside the
tensors, or else is what the family usually has.

Attributes:
  PREPROCESSING: how the images of a family are prepared, where nothing says so.
  Interpolation: how images are resized.
  LEFT_OUT: tensors that no module of ours has a place for.
  recognise_family: the family from the names of the tensors.
  vit_spec: the sizes of an image tower.
  swin_spec: the sizes of a Swin Transformer.
  resnet_spec: the sizes of a ResNet.
  text_spec: the sizes of a text tower.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from msba_jax.models.backbones.resnet import ResNetSpec
from msba_jax.models.backbones.swin import SwinSpec
from msba_jax.models.backbones.text import TextSpec
from msba_jax.models.backbones.vit import Activation, ViTSpec
from msba_jax.models.vit_names import Family
from msba_jax.models.weights import WeightsError

__all__ = [
  'LEFT_OUT',
  'PREPROCESSING',
  'ROOTS',
  'Interpolation',
  'recognise_family',
  'resnet_spec',
  'swin_spec',
  'text_spec',
  'vit_spec',
]

Shapes = Mapping[str, tuple[int, ...]]
Interpolation = Literal['bilinear', 'bicubic']

# Heads of classifiers, what pre-training alone needs, and counters.
LEFT_OUT = re.compile(
  r'pooler\.dense\.(weight|bias)|classifier\.(1\.)?(weight|bias)'
  r'|embeddings\.mask_token|(.*\.)?(position_ids|num_batches_tracked)'
  r'|.*\.relative_position_index'
)

# What the library puts in front of the names if the model had a classifier.
ROOTS = (
  'vit.',
  'deit.',
  'dinov2.',
  'dinov2_with_registers.',
  'swin.',
  'resnet.',
)

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# Mean, standard deviation, interpolation and, if it is not the size of the
# positions, the side of the images.
PREPROCESSING: dict[str, tuple[Any, Any, Interpolation, int | None]] = {
  'vit': (*_HALF, 'bilinear', None),
  'dinov2': (*_IMAGENET, 'bicubic', 224),
  'clip': (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
    'bicubic',
    None,
  ),
  'siglip': (*_HALF, 'bicubic', None),
  'swin': (*_IMAGENET, 'bicubic', 224),
  'resnet': (*_IMAGENET, 'bicubic', 224),
}

_SIGNS: tuple[tuple[Family, str], ...] = (
  ('siglip', 'vision_model.head.probe'),
  ('clip', 'vision_model.pre_layrnorm.weight'),
  ('dinov2', 'encoder.layer.0.layer_scale1.lambda1'),
  ('vit', 'encoder.layer.0.layernorm_before.weight'),
  ('swin', 'encoder.layers.0.blocks.0.layernorm_before.weight'),
  ('resnet', 'embedder.embedder.convolution.weight'),
)
_ACTIVATIONS: dict[str, Activation] = {
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'quick_gelu': 'quick_gelu',
}
_USUAL: dict[str, tuple[Activation, float]] = {
  'vit': ('gelu', 1e-12),
  'dinov2': ('gelu', 1e-6),
  'clip': ('quick_gelu', 1e-5),
  'siglip': ('gelu_tanh', 1e-6),
}


def recognise_family(names: Iterable[str]) -> Family | None:
  """The family whose tensors have such names; None if it is none of ours.

  Args:
    names: of all tensors, without the `ROOTS`.

  Returns:
    The family.

  Example:
    >>> recognise_family(['vision_model.head.probe'])
    'siglip'
  """
  names = set(names)
  for family, sign in _SIGNS:
    if sign in names:
      return family
  return None


def vit_spec(
  shapes: Shapes, family: Family, config: Mapping[str, Any] | None = None
) -> ViTSpec:
  """The sizes of the image tower.

  Args:
    shapes: of the tensors, by name.
    family: whose names they are.
    config: what `config.json` says of this tower.

  Returns:
    The spec of a `ViT` that takes these tensors.

  Raises:
    WeightsError: a tensor is missing that tells a size, a size makes no sense,
      or the config names an activation that we do not have.
  """
  towers = family in ('clip', 'siglip')
  root = 'vision_model.' if towers else ''
  stem = f'{root}embeddings.'
  patch_name = 'patch_embedding' if towers else 'patch_embeddings.projection'
  kernel = _shape(shapes, f'{stem}{patch_name}.weight', 4)
  position = 'position_embedding.weight' if towers else 'position_embeddings'
  places = _shape(shapes, stem + position)[-2]
  class_token = family != 'siglip'
  side = math.isqrt(places - class_token)
  if side * side + class_token != places:
    raise WeightsError(f'{stem}{position} is for no square: {places} places')
  block = f'{root}encoder.layer{"s" if towers else ""}'
  inner = 'intermediate.dense' if family == 'vit' else 'mlp.fc1'
  # Gate and what passes it are one layer of the giant DINOv2.
  gated = f'{block}.0.mlp.weights_in.weight' in shapes
  if gated:
    inner = 'mlp.weights_in'
  registers = f'{stem}register_tokens'
  count = _shape(shapes, registers)[-2] if registers in shapes else 0
  activation, epsilon = _taste(family, config)
  features = kernel[0]
  hidden = _shape(shapes, f'{block}.0.{inner}.weight')[0] // (1 + gated)
  return ViTSpec(
    features=features,
    depth=_depth(shapes, block),
    num_heads=_heads(features, family, config),
    patch=kernel[2],
    image=side * kernel[2],
    hidden=0 if hidden == 4 * features else hidden,
    class_token=class_token,
    registers=count,
    layer_scale=1.0 if family == 'dinov2' else None,
    norm_before=family == 'clip',
    patch_bias=f'{stem}{patch_name}.bias' in shapes,
    # The config says what a feed-forward without a gate would have.
    activation='silu' if gated else activation,
    gated=gated,
    epsilon=epsilon,
    # The library averages positions for this architecture alone.
    antialias=count > 0,
  )


def text_spec(
  shapes: Shapes, family: Family, config: Mapping[str, Any] | None = None
) -> TextSpec:
  """The sizes of the text tower; arguments and errors as in `vit_spec`."""
  stem = 'text_model.embeddings.'
  vocabulary, features = _shape(shapes, f'{stem}token_embedding.weight', 2)
  activation, epsilon = _taste(family, config)
  clip = family == 'clip'
  head = 'text_projection' if clip else 'text_model.head'
  inner = 'text_model.encoder.layers.0.mlp.fc1.weight'
  hidden = _shape(shapes, inner)[0]
  end = (config or {}).get('eos_token_id')
  if end in (None, 2):  # Early configs say 2 for the last of the vocabulary.
    end = vocabulary - 1
  return TextSpec(
    features=features,
    depth=_depth(shapes, 'text_model.encoder.layers'),
    num_heads=_heads(features, family, config),
    vocabulary=vocabulary,
    length=_shape(shapes, f'{stem}position_embedding.weight')[0],
    embedding=_shape(shapes, f'{head}.weight')[0],
    hidden=0 if hidden == 4 * features else hidden,
    causal=clip,
    pooled='end' if clip else 'last',
    end_token=end if clip else TextSpec.end_token,
    projection_bias=f'{head}.bias' in shapes,
    activation=activation,
    epsilon=epsilon,
  )


def swin_spec(shapes: Shapes) -> SwinSpec:
  """The sizes of a Swin Transformer; errors as in `vit_spec`."""
  kernel = _shape(shapes, 'embeddings.patch_embeddings.projection.weight', 4)
  stages = _depth(shapes, 'encoder.layers')
  first = [f'encoder.layers.{i}.blocks.0.' for i in range(stages)]
  tables = [
    _shape(shapes, f'{block}attention.self.relative_position_bias_table', 2)
    for block in first
  ]
  inner = _shape(shapes, f'{first[0]}intermediate.dense.weight', 2)
  return SwinSpec(
    features=kernel[0],
    blocks=tuple(
      _depth(shapes, f'encoder.layers.{i}.blocks') for i in range(stages)
    ),
    num_heads=tuple(heads for _, heads in tables),
    # A window of w × w has (2 w − 1)² displacements.
    window=(math.isqrt(tables[0][0]) + 1) // 2,
    patch=kernel[2],
    ratio=inner[0] // inner[1],
    levels=stages,
  )


def resnet_spec(shapes: Shapes) -> ResNetSpec:
  """The sizes of a ResNet with bottlenecks; errors as in `vit_spec`."""
  stages = _depth(shapes, 'encoder.stages')
  last = 'encoder.stages.{i}.layers.0.layer.2.convolution.weight'
  return ResNetSpec(
    blocks=tuple(
      _depth(shapes, f'encoder.stages.{i}.layers') for i in range(stages)
    ),
    widths=tuple(_shape(shapes, last.format(i=i), 4)[0] for i in range(stages)),
    stem=_shape(shapes, 'embedder.embedder.convolution.weight', 4)[0],
    levels=stages,
  )


def _shape(shapes: Shapes, name: str, rank: int | None = None):
  if name not in shapes:
    raise WeightsError(f'the tensor {name} is missing')
  shape = shapes[name]
  if len(shape) != (rank or max(len(shape), 2)):
    raise WeightsError(f'{name} has the shape {shape}, not {rank or 2} axes')
  return shape


def _depth(shapes: Shapes, block: str) -> int:
  """The number of blocks."""
  found = (re.match(rf'{re.escape(block)}\.(\d+)\.', x) for x in shapes)
  return 1 + max((int(x[1]) for x in found if x), default=-1)


def _heads(
  features: int, family: Family, config: Mapping[str, Any] | None
) -> int:
  heads = (config or {}).get('num_attention_heads')
  if heads is None:
    # 64 features a head but in ViT-H and So400m, which have 16 heads.
    wide = features > 1024 and family != 'dinov2'
    heads = 16 if wide else max(1, features // 64)
  if features % heads:
    raise WeightsError(f'{heads} heads do not divide {features} features')
  return heads


def _taste(
  family: Family, config: Mapping[str, Any] | None
) -> tuple[Activation, float]:
  """Activation and epsilon."""
  activation, epsilon = _USUAL[family]
  config = config or {}
  name = config.get('hidden_act')
  if name is not None and name not in _ACTIVATIONS:
    raise WeightsError(
      f'config.json says hidden_act={name!r}; known are '
      f'{", ".join(_ACTIVATIONS)}'
    )
  return (
    activation if name is None else _ACTIVATIONS[name],
    float(config.get('layer_norm_eps', epsilon)),
  )
