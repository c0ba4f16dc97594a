"""The scenes as sources of labelled images.

Attributes:
  ScenesSource: one split.
  ScenesData: the data of an experiment, from flags to splits.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import tensorflow_datasets as tfds

from msba_jax.data.errors import InputError
from msba_jax.data.scenes.builder import (
  Scenes,
  ScenesBuilderConfig,
  prepare,
  read_image,
  read_scene,
)
from msba_jax.data.scenes.config import SceneConfig, Split
from msba_jax.data.scenes.scene import Scene
from msba_jax.data.scenes.templates import make_templates
from msba_jax.data.source import (
  Evaluation,
  Record,
  Splits,
  check_share,
  keep_images,
)

_ORDER = 7919  # keeps the order of a split apart from what its scenes draw


class ScenesSource:
  """One split of prepared scenes.

  Scenes are drawn class after class and come in a random order that depends on
  the seed alone: a run of them says nothing of its labels.

  Args:
    builder: holds the records.
    split: which of them.
  """

  def __init__(self, builder: Scenes, split: Split):
    config = builder.builder_config
    assert isinstance(config, ScenesBuilderConfig)
    self._features = builder.info.features
    self._records = builder.as_data_source(
      split,  # pyright: ignore[reportCallIssue]
      deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
    )
    classes = config.scenes.classes(split)
    templates = make_templates(config.seed, config.scenes)
    rng = np.random.default_rng((config.seed, _ORDER))
    self._order = np.argsort(rng.random(len(self._records)))
    self.class_names = tuple(templates[c].name for c in classes)
    self.labels = (self._order % len(classes)).astype(np.int32)
    self.ids = tuple(f'{split}/{i:06d}' for i in self._order)
    self._content = (
      f'{builder.version} {split} {config.seed} {config.scenes} {len(self)}'
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Record:
    return Record(
      image=read_image(self._records[int(self._order[index])]),
      label=int(self.labels[index]),
    )

  def scene(self, index: int) -> Scene:
    """Everything known about an image; its label counts over all splits."""
    return read_scene(self._records[int(self._order[index])], self._features)

  def fingerprint(self) -> str:
    """Hexadecimal SHA-256 over all that the pictures depend on."""
    return hashlib.sha256(self._content.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class ScenesData(SceneConfig):
  """Scenes, drawn into `data_dir` when they are opened for the first time.

  Attributes:
    train_scenes: number of scenes to learn from.
    validation_scenes: number of scenes to choose on.
    test_scenes: number of scenes to test on.
    seed: chooses classes and scenes, and those that are left out.
    train_share: share of the scenes of every training class that are trained
      on, at least two; a smaller share is a part of a larger one. All of them
      are drawn.
    shifted: test on the shifted split, where the hue of the background says as
      little of the label as `shifted_correlation`; needs `hue_correlation`.
    data_dir: directory of TFDS data sets.

  Raises:
    InputError: a knob is outside its range.
  """

  train_scenes: int = 6000
  validation_scenes: int = 1000
  test_scenes: int = 1000
  seed: int = 0
  train_share: float = 1.0
  shifted: bool = False
  data_dir: str = 'data'

  def __post_init__(self):
    super().__post_init__()
    for split in ('train', 'validation', 'test'):
      number = getattr(self, f'{split}_scenes')
      if number < len(self.classes(split)):
        raise InputError(
          f'{split}_scenes={number} leaves classes empty: choose at least '
          f'{split}_classes={len(self.classes(split))}'
        )
    if self.seed < 0:
      raise InputError(f'seed={self.seed} must not be negative')
    check_share(self.train_share)
    if self.shifted and self.hue_correlation == 0:
      raise InputError('shifted needs a hue_correlation above 0')

  @property
  def knobs(self) -> SceneConfig:
    """What scenes look like, without how many and where they are."""
    names = [field.name for field in dataclasses.fields(SceneConfig)]
    return SceneConfig(**{name: getattr(self, name) for name in names})

  def prepare(self) -> Scenes:
    """Draws the scenes where they do not stand yet.

    Returns:
      A builder that holds the splits train, validation and test, and shifted
      where hue and label correlate.

    Raises:
      InputError: `data_dir` cannot be written.
    """
    return prepare(self._builder_config(), self.data_dir)

  def open(self) -> Splits:
    """Draws the scenes where they do not stand yet, and opens them.

    Returns:
      Training, validation and test; every scene asks all others of its split.

    Raises:
      InputError: `data_dir` cannot be written.
    """
    train, validation, test = self.sources()
    return Splits(
      keep_images(train, self.train_share, seed=self.seed),
      Evaluation(validation, None),
      Evaluation(test, None),
    )

  def sources(self) -> tuple[ScenesSource, ScenesSource, ScenesSource]:
    """Training, validation and test, drawn where they do not stand yet.

    These are all scenes, whatever `train_share` says.
    """
    builder = self.prepare()
    return (
      ScenesSource(builder, 'train'),
      ScenesSource(builder, 'validation'),
      ScenesSource(builder, 'shifted' if self.shifted else 'test'),
    )

  def _builder_config(self) -> ScenesBuilderConfig:
    numbers = {
      name: getattr(self, name)
      for name in ('train_scenes', 'validation_scenes', 'test_scenes', 'seed')
    }
    for config in Scenes.BUILDER_CONFIGS:
      if config.scenes == self.knobs and all(
        getattr(config, name) == number for name, number in numbers.items()
      ):
        return config
    content = f'{self.knobs} {numbers}'
    digest = hashlib.sha256(content.encode()).hexdigest()
    return ScenesBuilderConfig(
      name=f'custom_{digest[:16]}', scenes=self.knobs, **numbers
    )
