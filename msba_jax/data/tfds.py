"""Any TensorFlow Datasets data set that was prepared as ArrayRecord.

TFDS reads ArrayRecord without TensorFlow. What is prepared is opened from its
directory alone: the code of the data set is not imported and nothing is
downloaded. Images arrive as they were encoded and are decoded by
`msba_jax.data.images`.

The splits of many data sets share classes. For CUB, Cars and SOP the protocol
of retrieval is `class_split='first'`: the first half of the classes trains, the
last half tests, whatever split their images come from.

Attributes:
  TfdsData: which data set, where it lies, and how to split it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from msba_jax.data.errors import InputError
from msba_jax.data.images import Interpolation, decode_image
from msba_jax.data.progress import progress_bar
from msba_jax.data.source import Record, Splits
from msba_jax.data.splits import SplitData, SplitNames

_READ_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class TfdsData(SplitData):
  """A TFDS data set that was prepared as ArrayRecord."""

  name: str
  """Name, as in TFDS: name, name/config or name:version."""

  data_dir: str | None = None
  """Where data sets were prepared; default: TFDS_DATA_DIR, else
  ~/tensorflow_datasets."""

  image_key: str | None = None
  """Feature with the image; default: the supervised key, else the only one."""

  label_key: str | None = None
  """Feature with the label; default: the supervised key, else the only one."""

  splits: SplitNames = dataclasses.field(default_factory=SplitNames)
  """What the data set calls its splits."""

  def open(self) -> Splits:
    """Reads all labels and divides the images.

    Returns:
      The splits.

    Raises:
      InputError: the data set is not prepared, not as ArrayRecord, or has no
        image or no label.
    """
    import tensorflow_datasets as tfds

    directory = _prepared(self.name, self._root(), self._command())
    try:
      builder: Any = tfds.builder_from_directory(directory)
    except Exception as error:  # Whatever reading foreign metadata raises.
      raise InputError(
        f'{directory} cannot be read ({error}): prepare it anew: '
        f'{self._command()}'
      ) from error
    features: Any = builder.info.features
    image_key, label_key = self._keys(builder.info, tfds.features)
    sizes = {k: s.num_examples for k, s in builder.info.splits.items()}
    roles = self.splits.roles(
      list(sizes), where=self.name, needed=self.own_splits
    )
    skip = tfds.decode.SkipDecoding()
    decoders = {key: skip for key in features if key != label_key}
    try:
      sources = {
        split: builder.as_data_source(split, decoders=decoders)
        for split in roles
      }
    except NotImplementedError as error:
      raise InputError(
        f'{directory} is not in ArrayRecord format: prepare it in another '
        f'data_dir: {self._command()}'
      ) from error
    source = _TfdsSource(
      sources,
      _Keys(image_key, label_key),
      class_names=_class_names(features[label_key]),
      size=self.size,
      interpolation=self.interpolation,
      directory=directory,
    )
    own, begin = {}, 0
    for split, role in roles.items():
      own[role] = np.arange(begin, begin + sizes[split])
      begin += sizes[split]
    return self.divide(source, own, name=self.name)

  def _root(self) -> str:
    default = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
    return os.path.expanduser(self.data_dir or default)

  def _command(self) -> str:
    return (
      f'tfds build {self.name.split(":")[0]} --data_dir={self._root()} '
      '--file_format=array_record'
    )

  def _keys(self, info: Any, kinds: Any) -> tuple[str, str]:
    """Which features hold the image and the label."""
    supervised = info.supervised_keys or (None, None)
    return (
      _key(self, 'image', self.image_key, supervised[0], info, kinds.Image),
      _key(
        self, 'label', self.label_key, supervised[-1], info, kinds.ClassLabel
      ),
    )


class _Keys(NamedTuple):
  image: str
  label: str


class _TfdsSource:
  """The images of several splits, one after the other."""

  def __init__(
    self,
    splits: dict[str, Any],
    keys: _Keys,
    *,
    class_names: tuple[str, ...] | None,
    size: int,
    interpolation: Interpolation,
    directory: str,
  ):
    self._keys = keys
    self._size = size
    self._interpolation: Interpolation = interpolation
    self._directory = directory
    self._splits = list(splits.values())
    lengths = [self._checked(len, split) for split in self._splits]
    self._ends = np.cumsum(lengths)
    self.ids = tuple(
      f'{name}/{i:06d}'
      for name, length in zip(splits, lengths, strict=True)
      for i in range(length)
    )
    labels = self._read_labels()
    if class_names is None:
      names, labels = np.unique(labels, return_inverse=True)
      class_names = tuple(str(name) for name in names)
    self.labels = np.asarray(labels, np.int32)
    self.class_names = class_names

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> Record:
    part = int(np.searchsorted(self._ends, index, side='right'))
    split = self._splits[part]
    place = index - int(self._ends[part]) + len(split)
    example = self._checked(split.__getitem__, place)
    image = decode_image(
      example[self._keys.image],
      name=f'{self._directory}: {self.ids[index]}',
      size=self._size,
      interpolation=self._interpolation,
    )
    return Record(image=image, label=int(self.labels[index]))

  def fingerprint(self) -> str:
    """Hexadecimal SHA-256 over keys, size, and the files of the data set."""
    digest = hashlib.sha256(
      f'{self._size}\n{self._interpolation}\n{self._keys}\n{self.ids}'.encode()
    )
    digest.update(self.labels.tobytes())
    for name in sorted(os.listdir(self._directory)):
      status = os.stat(os.path.join(self._directory, name))
      line = f'{name}\0{status.st_size}\0{status.st_mtime_ns}\n'
      digest.update(line.encode())
    return digest.hexdigest()

  def _checked(self, read: Callable[[Any], Any], argument: Any) -> Any:
    """Calls a reader of TFDS, which raises anything on broken files."""
    try:
      return read(argument)
    except Exception as error:
      raise InputError(
        f'{self._directory} cannot be read ({error}): copy it again, or '
        'prepare it anew'
      ) from error

  def _read_labels(self) -> np.ndarray:
    """All labels; the records are read, the images in them not decoded."""
    labels: list[int] = []
    with progress_bar(len(self.ids), desc='labels', unit='image') as bar:
      for split in self._splits:
        for start in range(0, len(split), _READ_AT_ONCE):
          stop = min(start + _READ_AT_ONCE, len(split))
          some = self._checked(split.__getitems__, range(start, stop))
          labels += [int(example[self._keys.label]) for example in some]
          bar.update(stop - start)
    return np.asarray(labels, np.int64)


def _class_names(feature: Any) -> tuple[str, ...] | None:
  """The names of a ClassLabel; None for a label that is a plain integer."""
  names = getattr(feature, 'names', None)
  if names is not None:
    return tuple(names)
  number = getattr(feature, 'num_classes', None)
  return None if number is None else tuple(str(i) for i in range(number))


def _key(
  data: TfdsData,
  what: str,
  wanted: str | None,
  supervised: Any,
  info: Any,
  kind: type,
) -> str:
  """The feature that was asked for, or the only one that it can be."""
  features = info.features
  fitting = [k for k in features if isinstance(features[k], kind)]
  if wanted is not None:
    if wanted in features:
      return wanted
  elif supervised in fitting:
    return supervised
  elif what in fitting:
    return what
  elif len(fitting) == 1:
    return fitting[0]
  raise InputError(
    f'{data.name}: {what}_key={wanted} names no {what}: set it to one of '
    f'{", ".join(sorted(fitting or features))}'
  )


def _prepared(name: str, root: str, command: str) -> str:
  """The directory in which a data set was prepared, of the newest version."""
  path, _, version = name.partition(':')
  parts = path.split('/')
  if '..' in parts or '' in parts:
    raise InputError(
      f'{name!r} is no name of a data set: use name, name/config, name:version'
    )
  below = os.path.join(root, *parts)
  found = _versions(below)
  if not found and os.path.isdir(below):
    configs = [
      c for c in sorted(os.listdir(below)) if _versions(f'{below}/{c}')
    ]
    if len(configs) > 1:
      raise InputError(
        f'{name} is prepared in several configs: use one of '
        f'{", ".join(f"{path}/{config}" for config in configs)}'
      )
    if configs:
      below = os.path.join(below, configs[0])
      found = _versions(below)
  if version:
    found = [v for v in found if v == version]
  if not found:
    raise InputError(
      f'{name} is not prepared in {root}: prepare it where TensorFlow is '
      f'installed: {command}'
    )
  return os.path.join(below, found[-1])


def _versions(directory: str) -> list[str]:
  """Versions with metadata, ascending."""
  if not os.path.isdir(directory):
    return []
  found = [
    v
    for v in os.listdir(directory)
    if os.path.isfile(os.path.join(directory, v, 'dataset_info.json'))
    and all(part.isdigit() for part in v.split('.'))
  ]
  return sorted(found, key=lambda v: [int(part) for part in v.split('.')])
