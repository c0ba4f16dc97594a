"""Converts a published checkpoint in safetensors to weights of this library.

Every tensor is checked for name and shape and used, or named as left out.
`config.json` and `preprocessor_config.json` are read if they lie beside the
file. Nothing is downloaded, and no pickle file is read.

Attributes:
  Options: the flags of `msba import-weights`.
  run: converts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

EXAMPLES = """\
  msba import-weights dinov2-base/model.safetensors weights/dinov2_base
  msba import-weights model.safetensors weights/clip --family clip
  msba import-weights model.safetensors weights/dinov2_448 --size 448
"""
INTERRUPTED = 'No weights were written; what stood there before still stands.'


@dataclass(frozen=True)
class Options:
  """Flags of `msba import-weights`."""

  file: Annotated[Path, Positional, arg(metavar='FILE')]
  """A .safetensors file."""
  out: Annotated[Path, Positional, arg(metavar='OUT')]
  """Directory of the weights; weights that stand there are replaced."""
  family: Literal[
    'auto', 'vit', 'dinov2', 'clip', 'siglip', 'swin', 'resnet'
  ] = 'auto'
  """Whose checkpoint it is; auto tells it from the names of the tensors."""
  size: int | None = None
  """Side in pixels of the images; default: what the weights were made for."""


def run(options: Options) -> int:
  """Converts; 0 when the weights stand."""
  from msba_jax.training.import_weights import import_weights

  family = None if options.family == 'auto' else options.family
  found = import_weights(
    options.file, options.out, family=family, size=options.size
  )
  parts = ', '.join(found.parts)
  print(f'{found.family} weights stand in {options.out}: {parts}.')
  print(found.backbone)
  if found.text is not None:
    print(found.text)
  print(found.preprocessing)
  if found.left_out:
    print(f'Left out: {", ".join(found.left_out)}.')
  return 0
