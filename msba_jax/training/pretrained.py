"""Published weights, as `import_weights` writes them.

A directory of imported weights holds `arrays.npz` and a manifest with hashes,
the sizes of the towers, and how images must be prepared for them. Its parts:

    backbone     variables of a `ViT`, `Swin` or `ResNet`
    image_head   what an `ImageTower` adds (CLIP, SigLIP)
    text         variables of a `TextTower` (CLIP, SigLIP)
    logits       temperature and bias of similarities (CLIP, SigLIP)

Attributes:
  Preprocessing: how images are prepared.
  Pretrained: what a directory holds.
  save_pretrained: writes a directory.
  load_pretrained: reads it.
  image_tower: the image tower of a family.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msba_jax.data.errors import InputError
from msba_jax.models.backbones.image_tower import ImageTower
from msba_jax.models.backbones.resnet import ResNetSpec
from msba_jax.models.backbones.swin import SwinSpec
from msba_jax.models.backbones.text import TextSpec
from msba_jax.models.backbones.vit import ViT, ViTSpec
from msba_jax.models.published import Interpolation
from msba_jax.models.vit_names import Family
from msba_jax.training.weights import read_weights, save_weights

__all__ = [
  'Preprocessing',
  'Pretrained',
  'image_tower',
  'load_pretrained',
  'save_pretrained',
]

BackboneSpec = ViTSpec | SwinSpec | ResNetSpec

_KIND = 'pretrained'


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """How images are prepared for pretrained weights.

  Attributes:
    size: pixels along a side.
    mean: of the channels, for images in [0, 1].
    std: likewise.
    interpolation: of the resizing.
  """

  size: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  interpolation: Interpolation


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
  """What a directory of imported weights holds.

  Attributes:
    family: whose checkpoint it was.
    backbone: sizes of the backbone, which is the image tower if there are
      two towers.
    text: sizes of the text tower, or None.
    preprocessing: how images are prepared.
    parts: variables by part.
    left_out: tensors of the checkpoint that have no place.
  """

  family: Family
  backbone: BackboneSpec
  text: TextSpec | None
  preprocessing: Preprocessing
  parts: Mapping[str, Any]
  left_out: tuple[str, ...] = ()


def save_pretrained(
  directory: str | Path, found: Pretrained, *, source: str
) -> None:
  """Writes a directory; one that stands there is replaced.

  Args:
    directory: the goal.
    found: what to write.
    source: name of the file that it was made of.
  """
  facts = {
    'kind': _KIND,
    'family': found.family,
    'source': source,
    'left_out': list(found.left_out),
    'backbone': dataclasses.asdict(found.backbone),
    'text': found.text and dataclasses.asdict(found.text),
    'preprocessing': dataclasses.asdict(found.preprocessing),
  }
  save_weights(Path(directory), found.parts, step=0, facts=facts)


def load_pretrained(directory: str | Path) -> Pretrained:
  """Reads what `save_pretrained` wrote.

  Args:
    directory: of imported weights.

  Returns:
    What it holds, as host arrays.

  Raises:
    InputError: it is no such directory, or not what was written.
  """
  directory = Path(directory)
  if not directory.is_dir():
    raise InputError(
      f'pretrained weights {directory} do not exist; make them with '
      '`msba import-weights`'
    )
  parts, facts = read_weights(
    directory, again='make them again with `msba import-weights`'
  )
  if facts.get('kind') != _KIND:
    raise InputError(
      f'{directory} holds no imported weights; make them with '
      '`msba import-weights`'
    )
  preprocessing = dict(facts['preprocessing'])
  for name in ('mean', 'std'):
    preprocessing[name] = tuple(preprocessing[name])
  return Pretrained(
    family=facts['family'],
    backbone=_spec(facts['family'], facts['backbone']),
    text=TextSpec(**facts['text']) if facts['text'] else None,
    preprocessing=Preprocessing(**preprocessing),
    parts=parts,
    left_out=tuple(facts['left_out']),
  )


def _spec(family: Family, fields: Mapping[str, Any]) -> BackboneSpec:
  kind = {'swin': SwinSpec, 'resnet': ResNetSpec}.get(family, ViTSpec)
  return kind(
    **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
  )


def image_tower(spec: ViTSpec, family: Family, embedding: int) -> ImageTower:
  """The image tower of a family that compares images with texts."""
  head = 'class_token' if family == 'clip' else 'attention'
  return ImageTower(ViT(spec), head, embedding=embedding)
