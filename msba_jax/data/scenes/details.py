"""Scenes whose class is a detail: shape and texture of one object.

The class of a scene says what its objects are and how they stand; their
textures and sizes vary within it. Here they are what is asked for: the smallest
or the largest object of a scene, whatever its colour and whatever else is in
the picture.

Attributes:
  CLASSES: pairs of a shape and a texture.
  Detail: which object.
  DetailSource: the scenes of a source, labelled by a detail.
  DetailData: the data of an experiment, from flags to splits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from typing import Literal

import numpy as np

from msba_jax.data.scenes.objects import SceneObject
from msba_jax.data.scenes.source import ScenesData, ScenesSource
from msba_jax.data.scenes.templates import SHAPES, SIZES, TEXTURES
from msba_jax.data.source import (
  Evaluation,
  Record,
  Splits,
  keep_classes,
  keep_images,
  random_order,
)

__all__ = ['CLASSES', 'Detail', 'DetailData', 'DetailSource']

Detail = Literal['smallest', 'largest']

CLASSES = tuple(itertools.product(SHAPES, TEXTURES))
_SHARES = (0.5, 0.75)  # of the classes: training, then validation, then test


class DetailSource:
  """The scenes in which one object is smaller, or larger, than all others.

  Labels are known when all records have been read, pictures are decoded later.

  Args:
    source: the scenes.
    detail: which object says the class.
  """

  def __init__(self, source: ScenesSource, detail: Detail):
    found = [_find(source.scene(i).objects, detail) for i in range(len(source))]
    self._source, self._detail = source, detail
    self._indices = [i for i, label in enumerate(found) if label is not None]
    self.labels = np.array(
      [label for label in found if label is not None], np.int32
    )
    self.class_names = tuple(f'{texture} {s}' for s, texture in CLASSES)
    self.ids = tuple(source.ids[i] for i in self._indices)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Record:
    image = self._source[self._indices[index]]['image']
    return Record(image=image, label=int(self.labels[index]))

  def fingerprint(self) -> str:
    """Hexadecimal SHA-256 over all that pictures and labels depend on."""
    content = f'{self._source.fingerprint()} {self._detail}'
    return hashlib.sha256(content.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class DetailData(ScenesData):
  """Scenes by detail: half of the classes train, a quarter validates or tests.

  The scenes of a part come from the split of that name, so that neither detail
  nor objects of a test scene were seen in training.

  Attributes:
    detail: which object says the class.
  """

  detail: Detail = 'smallest'

  def open(self) -> Splits:
    """Draws the scenes where they do not stand yet, and divides them.

    Returns:
      The splits; every scene asks all others of its split.

    Raises:
      InputError: `data_dir` cannot be written.
    """
    names = [' '.join(pair) for pair in CLASSES]
    order = random_order(names, seed=self.seed)
    parts = np.split(order, [round(share * len(order)) for share in _SHARES])
    train, validation, test = (
      keep_classes(DetailSource(source, self.detail), part)
      for source, part in zip(self.sources(), parts, strict=True)
    )
    return Splits(
      keep_images(train, self.train_share, seed=self.seed),
      Evaluation(validation, None),
      Evaluation(test, None),
    )


def _find(objects: tuple[SceneObject, ...], detail: Detail) -> int | None:
  """The class of the one object of extreme size, None if it is not one."""
  sizes = [SIZES.index(thing.size) for thing in objects]
  extreme = min(sizes) if detail == 'smallest' else max(sizes)
  if sizes.count(extreme) != 1:
    return None
  thing = objects[sizes.index(extreme)]
  return CLASSES.index((thing.shape, thing.texture))
