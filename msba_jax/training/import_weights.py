"""Published checkpoints to directories of weights.

Attributes:
  import_weights: makes a directory from a safetensors file.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from msba_jax.data.errors import InputError
from msba_jax.models import published
from msba_jax.models.backbones.resnet import ResNet, resnet_names
from msba_jax.models.backbones.swin import Swin, swin_names
from msba_jax.models.backbones.text import TextTower
from msba_jax.models.backbones.vit import ViT, ViTSpec
from msba_jax.models.vit_names import (
  Family,
  image_head_tensors,
  logit_tensors,
  text_tensors,
  vit_tensors,
)
from msba_jax.models.weight_names import Tensor
from msba_jax.models.weights import WeightsError, convert_tensors
from msba_jax.training.pretrained import (
  BackboneSpec,
  Preprocessing,
  Pretrained,
  image_tower,
  save_pretrained,
)

__all__ = ['import_weights']

_INTERPOLATIONS: dict[int, published.Interpolation] = {
  2: 'bilinear',
  3: 'bicubic',
}


class _File(Mapping[str, np.ndarray]):
  """The tensors of a safetensors file, read when asked for."""

  def __init__(self, file: Any, path: Path):
    names = list(file.keys())
    self._file, self._path = file, path
    # A root is taken off only if it stands before something.
    self._names = {_without_root(name): name for name in names}
    if len(self._names) < len(names):
      raise InputError(f'{path} has a tensor twice, with and without a root')

  def __getitem__(self, name: str) -> np.ndarray:
    try:
      return np.asarray(self._file.get_tensor(self._names[name]))
    except SafetensorError as error:
      raise InputError(f'{self._path} cannot be read: {error}') from error

  def __contains__(self, name: object) -> bool:
    return name in self._names

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shapes alone, without reading a tensor."""
    return {
      ours: tuple(self._file.get_slice(name).get_shape())
      for ours, name in self._names.items()
    }


def import_weights(
  path: str | Path,
  goal: str | Path,
  *,
  family: Family | None = None,
  size: int | None = None,
) -> Pretrained:
  """Converts a safetensors file and writes a directory of weights.

  `config.json` and `preprocessor_config.json` are read if they lie beside the
  file, as they are published.

  Args:
    path: a `.safetensors` file.
    goal: the directory to write; one that stands there is replaced.
    family: whose checkpoint it is; None recognises it.
    size: pixels along a side of the images that the weights will see; None is
      what they are published for.

  Returns:
    What was written.

  Raises:
    InputError: the file is no safetensors file or of no known family, a tensor
      is missing, left over or of a wrong shape, or a config cannot be used.
  """
  path = Path(path)
  found = _convert(path, family, size)
  save_pretrained(goal, found, source=path.name)
  return found


def _convert(path: Path, family: Family | None, size: int | None) -> Pretrained:
  config = _beside(path, 'config.json')
  prepared = _beside(path, 'preprocessor_config.json')
  try:
    with safe_open(path, framework='flax') as file:
      tensors = _File(file, path)
      return _pretrained(tensors, family, size, config, prepared)
  except FileNotFoundError:
    raise InputError(f'{path} does not exist') from None
  except SafetensorError as error:
    raise InputError(
      f'{path} is no safetensors file ({error}); a pickle file (.bin, .pt, '
      '.pth) is never read: convert it where you trust it'
    ) from error
  except (OSError, WeightsError) as error:
    raise InputError(f'{path}: {error}') from error


def _pretrained(
  tensors: _File,
  family: Family | None,
  size: int | None,
  config: Mapping[str, Any],
  prepared: Mapping[str, Any],
) -> Pretrained:
  """The parts of a checkpoint, every tensor accounted for."""
  family = family or published.recognise_family(tensors)
  if family is None:
    raise WeightsError(
      'no known family has such tensor names; give --family if it is one of '
      'vit, dinov2, clip, siglip, swin, resnet'
    )
  shapes = tensors.shapes()
  parts, used = {}, set()

  def add(
    part: str, table: Iterable[Tensor], module: nn.Module, given: Any, own=None
  ):
    wanted: Any = jax.eval_shape(module.init, jax.random.key(0), given)
    if own is not None:
      wanted = {'params': {own: wanted['params'][own]}}
    parts[part], names = convert_tensors(tensors, table, wanted)
    used.update(names)

  if family == 'swin':
    spec = published.swin_spec(shapes)
    table = swin_names(spec, prefix='')
    add('backbone', table, Swin(spec), _pixels(224))
  elif family == 'resnet':
    spec = published.resnet_spec(shapes)
    table = resnet_names(spec, prefix='')
    add('backbone', table, ResNet(spec), _pixels(224))
  else:
    vision = config.get('vision_config', config)
    spec = published.vit_spec(shapes, family, vision)
    pixels = _pixels(spec.image)
    add('backbone', vit_tensors(spec, family), ViT(spec), pixels)
    width = shapes.get('visual_projection.weight', (0,))[0]
    if family == 'siglip' or width:
      tower = image_tower(spec, family, width)
      head = 'pool' if family == 'siglip' else 'projection'
      add('image_head', image_head_tensors(family), tower, pixels, head)
  text = None
  if any(name.startswith('text_model.') for name in tensors):
    text = published.text_spec(shapes, family, config.get('text_config'))
    ids = jax.ShapeDtypeStruct((1, text.length), jnp.int32)
    add('text', text_tensors(text, family), TextTower(text), ids)
    scalars = {entry.path[-1]: np.zeros(()) for entry in logit_tensors(family)}
    parts['logits'], names = convert_tensors(
      tensors, logit_tensors(family), {'params': scalars}
    )
    used.update(names)
  rest = sorted(set(tensors) - used)
  left_out = [name for name in rest if published.LEFT_OUT.fullmatch(name)]
  unknown = [name for name in rest if name not in left_out]
  if unknown:
    raise WeightsError(
      f'{len(unknown)} tensors have no place in a {family} model: '
      f'{", ".join(unknown[:5])}{", …" if len(unknown) > 5 else ""}; is it '
      'another family or variant?'
    )
  return Pretrained(
    family=family,
    backbone=spec,
    text=text,
    preprocessing=_preprocessing(family, spec, size, prepared),
    parts=parts,
    left_out=tuple(left_out),
  )


def _pixels(size: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


def _without_root(name: str) -> str:
  for root in published.ROOTS:
    if name.startswith(root):
      return name.removeprefix(root)
  return name


def _beside(path: Path, name: str) -> dict[str, Any]:
  """A JSON object in the folder of the file; {} if there is none."""
  path = path.with_name(name)
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise InputError(f'{path} cannot be read ({error})') from error
  if not isinstance(value, dict):
    raise InputError(f'{path} holds no JSON object')
  return value


def _preprocessing(
  family: Family,
  spec: BackboneSpec,
  wished: int | None,
  given: Mapping[str, Any],
) -> Preprocessing:
  """What `preprocessor_config.json` says, else what the family usually has."""
  mean, std, interpolation, size = published.PREPROCESSING[family]
  mean = _three(given, 'image_mean', mean)
  std = _three(given, 'image_std', std)
  patch = spec.patch if isinstance(spec, ViTSpec) else 1
  size = size or getattr(spec, 'image', 224)
  crop = given.get('crop_size') if given.get('do_center_crop') else None
  for wanted in (given.get('size'), crop):
    if isinstance(wanted, Mapping):
      wanted = wanted.get('height', wanted.get('shortest_edge'))
    if wanted is not None:
      size = int(wanted)
  size = wished or size
  code = given.get('resample')
  if code is not None:
    if code not in _INTERPOLATIONS:
      raise WeightsError(
        f'preprocessor_config.json says resample={code}; known are 2 '
        '(bilinear) and 3 (bicubic)'
      )
    interpolation = _INTERPOLATIONS[code]
  if size < 1 or size % patch:
    raise WeightsError(
      f'images of {size} pixels are no multiple of patches of {patch}; '
      'give --size'
    )
  return Preprocessing(size, mean, std, interpolation)


def _three(
  given: Mapping[str, Any], name: str, usual: tuple[float, ...]
) -> tuple[float, ...]:
  values = given.get(name, usual)
  try:
    numbers = tuple(float(x) for x in values)
  except (TypeError, ValueError):
    numbers = ()
  if len(numbers) != 3 or not np.isfinite(numbers).all():
    raise WeightsError(f'preprocessor_config.json: {name} must be 3 numbers')
  return numbers
