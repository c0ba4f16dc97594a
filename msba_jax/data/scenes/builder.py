"""The scenes as a TFDS builder, written and read without TensorFlow.

The records are ArrayRecord, because any other format needs TensorFlow, and for
the same reason images are handed to TFDS as PNG, not as arrays. Record i of a
split is scene i: TFDS is told not to shuffle. `tfds.load` does not work without
TensorFlow; `Scenes(config='shortcut', data_dir=…)` with `as_data_source` does.

Attributes:
  ScenesBuilderConfig: knobs, numbers of scenes and the seed.
  Scenes: the builder.
  prepare: a builder whose records stand.
  read_image: the picture of a serialized record.
  read_scene: all of a serialized record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from msba_jax.data.errors import InputError
from msba_jax.data.progress import progress_bar
from msba_jax.data.scenes.config import PRESETS, SceneConfig, Split
from msba_jax.data.scenes.objects import Edge, SceneObject
from msba_jax.data.scenes.scene import Scene, draw_scene
from msba_jax.data.scenes.templates import (
  COLOURS,
  HUES,
  RELATIONS,
  SHAPES,
  SIZES,
  TEXTURES,
  make_templates,
)

_MEASURES = ('x', 'y', 'radius', 'angle', 'hidden')
_NAMES = {
  'shape': SHAPES,
  'colour': COLOURS,
  'size': SIZES,
  'texture': TEXTURES,
}
_PICTURE = tfds.features.FeaturesDict({'image': tfds.features.Image()})
_ENCODED = {'image': tfds.decode.SkipDecoding()}


@dataclasses.dataclass(eq=False, kw_only=True)
class ScenesBuilderConfig(tfds.core.BuilderConfig):
  """What a prepared data set consists of.

  Attributes:
    scenes: the knobs.
    train_scenes: number of scenes to learn from.
    validation_scenes: number of scenes to choose on.
    test_scenes: number of scenes to test on, also of the shifted test.
    seed: chooses classes and scenes.
  """

  scenes: SceneConfig = dataclasses.field(default_factory=SceneConfig)
  train_scenes: int = 6000
  validation_scenes: int = 1000
  test_scenes: int = 1000
  seed: int = 0

  @property
  def sizes(self) -> dict[Split, int]:
    """Number of scenes by split; the shifted test needs something to shift."""
    sizes: dict[Split, int] = {
      'train': self.train_scenes,
      'validation': self.validation_scenes,
      'test': self.test_scenes,
    }
    if self.scenes.hue_correlation > 0:
      sizes['shifted'] = self.test_scenes
    return sizes


class Scenes(tfds.core.GeneratorBasedBuilder):
  """Scenes drawn from templates; a class is a relation between two objects.

  Its configurations are the `PRESETS`, with 6,000 scenes to learn from and
  1,000 each to validate and to test on.
  """

  # To be raised by every change of what is drawn.
  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = [  # noqa: RUF012
    ScenesBuilderConfig(name=name, scenes=scenes)
    for name, scenes in PRESETS.items()
  ]

  def __init__(self, **kwargs: Any):
    super().__init__(file_format='array_record', **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features
    config = self._config
    size = config.scenes.size
    templates = make_templates(config.seed, config.scenes)
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      disable_shuffling=True,
      features=features.FeaturesDict({
        'image': features.Image(shape=(size, size, 3), encoding_format='png'),
        'label': features.ClassLabel(names=[t.name for t in templates]),
        'number': np.int64,
        'hue': features.ClassLabel(names=HUES),
        'masks': features.Tensor(
          shape=(None, size, size), dtype=np.bool_, encoding='zlib'
        ),
        'objects': features.Sequence({
          'box': features.BBoxFeature(),
          **{
            name: features.ClassLabel(names=values)
            for name, values in _NAMES.items()
          },
          **dict.fromkeys(_MEASURES, np.float32),
        }),
        'graph': features.Sequence({
          'subject': np.int32,
          'relation': features.ClassLabel(names=RELATIONS),
          'target': np.int32,
        }),
        'captions': features.Sequence(features.Text()),
      }),
    )  # fmt: skip

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager
    return {
      split: self._generate_examples(split, size)
      for split, size in self._config.sizes.items()
    }

  def _generate_examples(
    self, split: Split, size: int
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    config = self._config
    with progress_bar(size, desc=f'scenes, {split}', unit='scene') as bar:
      for index in range(size):
        scene = draw_scene(config.seed, index, config.scenes, split=split)
        yield index, _encode(scene)
        bar.update()

  @property
  def _config(self) -> ScenesBuilderConfig:
    config = self.builder_config
    assert isinstance(config, ScenesBuilderConfig)
    return config


def prepare(config: ScenesBuilderConfig, data_dir: str) -> Scenes:
  """Opens prepared scenes, drawing them first where they do not stand.

  They are written aside and renamed when complete, so that what stands is
  whole. Of several processes that prepare the same, the first one wins.

  Args:
    config: what to draw.
    data_dir: the directory of TFDS data sets.

  Returns:
    A builder to read from.

  Raises:
    InputError: the directory cannot be written, or holds something else.
  """
  data_dir = os.path.expanduser(data_dir)
  with _quiet():
    builder = Scenes(config=config, data_dir=data_dir)
    try:
      builder.download_and_prepare()
    except OSError as error:
      if not os.path.isdir(builder.data_dir):
        raise InputError(
          f'scenes cannot be written to {data_dir} ({error}): choose another '
          'data_dir'
        ) from error
      builder = Scenes(config=config, data_dir=data_dir)
  found = {
    name: info.num_examples for name, info in builder.info.splits.items()
  }
  if found != config.sizes:
    raise InputError(
      f'{builder.data_dir} holds {found} and not {config.sizes} scenes: '
      'remove it'
    )
  return builder


def read_image(record: bytes) -> np.ndarray:
  """Decodes the picture of a serialized record and nothing else.

  Args:
    record: as `as_data_source` gives it for `RAW_BYTES`.

  Returns:
    uint8, (size, size, 3).
  """
  fields: Any = _PICTURE.deserialize_example_np(record, decoders=_ENCODED)
  return _decode_png(fields['image'])


def read_scene(record: bytes, features: Any) -> Scene:
  """Decodes a serialized record.

  Args:
    record: as `as_data_source` gives it for `RAW_BYTES`.
    features: `info.features` of the builder.

  Returns:
    The scene, equal to what `draw_scene` gave.
  """
  fields: Any = features.deserialize_example_np(record, decoders=_ENCODED)
  objects, graph = fields['objects'], fields['graph']
  names = [
    [values[i] for i in objects[name]] for name, values in _NAMES.items()
  ]
  measures = [map(float, objects[name]) for name in _MEASURES]
  return Scene(
    image=_decode_png(fields['image']),
    label=int(fields['label']),
    number=int(fields['number']),
    hue=HUES[fields['hue']],
    boxes=np.asarray(objects['box'], np.float32),
    masks=fields['masks'],
    objects=tuple(
      SceneObject(*values) for values in zip(*names, *measures, strict=True)
    ),
    graph=tuple(
      Edge(int(subject), RELATIONS[relation], int(target))
      for subject, relation, target in zip(
        graph['subject'], graph['relation'], graph['target'], strict=True
      )
    ),
    captions=tuple(text.decode() for text in fields['captions']),
  )


def _encode(scene: Scene) -> dict[str, Any]:
  """A scene as the features want it."""
  png = io.BytesIO()
  Image.fromarray(scene.image).save(png, 'png', compress_level=1)
  png.seek(0)
  return {
    'image': png,
    'label': scene.label,
    'number': scene.number,
    'hue': scene.hue,
    'masks': scene.masks,
    'objects': [
      {'box': tfds.features.BBox(*map(float, box)), **thing._asdict()}
      for box, thing in zip(scene.boxes, scene.objects, strict=True)
    ],
    'graph': [edge._asdict() for edge in scene.graph],
    'captions': list(scene.captions),
  }


def _decode_png(encoded: bytes) -> np.ndarray:
  with Image.open(io.BytesIO(encoded)) as image:
    return np.asarray(image)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences what TFDS says of downloads, and its bars beside ours."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  tfds.display_progress_bar(False)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.display_progress_bar(True)
    logger.setLevel(level)
