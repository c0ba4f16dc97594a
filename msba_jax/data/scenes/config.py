"""The knobs of the scenes: everything a scene depends on but seed and index.

Attributes:
  SPLITS: the parts of the data set, in the order of their class numbers.
  SceneConfig: the knobs.
  PRESETS: named settings; the builder offers each as a configuration.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from msba_jax.data.errors import InputError

Split = Literal['train', 'validation', 'test', 'shifted']

SPLITS: tuple[Split, ...] = ('train', 'validation', 'test')

_RANGES = {
  'size': (16, 512),
  'train_classes': (1, 1000),
  'validation_classes': (1, 300),
  'test_classes': (1, 300),
  'arrangements': (1, 6),
  'least_objects': (2, 6),
  'most_objects': (2, 6),
  'hue_correlation': (0, 1),
  'shifted_correlation': (0, 1),
  'occlusion': (0, 0.6),
  'view_jitter': (0, 1),
  'noise': (0, 0.5),
}


@dataclasses.dataclass(frozen=True)
class SceneConfig:
  """What scenes look like and which classes there are.

  Attributes:
    size: height and width in pixels.
    train_classes: number of templates to learn from.
    validation_classes: number of templates to choose on.
    test_classes: number of templates to test on.
    arrangements: how many classes have the same objects and differ only in
      the relation between them, which makes them each other's hard negatives;
      1 gives every class objects of its own.
    least_objects: fewest objects in a scene, distractors included.
    most_objects: most objects in a scene; with 2 there are no distractors.
    hue_correlation: correlation of the hue of the background with the label;
      0 draws the hue at random, 1 gives it away.
    shifted_correlation: the same for the split `shifted`, which repeats the
      scenes of the test with other backgrounds.
    occlusion: largest part of an object that others may hide; 0 keeps objects
      apart.
    view_jitter: strength of zoom, rotation and shift of the view.
    noise: standard deviation of the noise of a pixel; white is 1.

  Raises:
    InputError: a knob is outside its range.
  """

  size: int = 64
  train_classes: int = 60
  validation_classes: int = 20
  test_classes: int = 20
  arrangements: int = 3
  least_objects: int = 2
  most_objects: int = 6
  hue_correlation: float = 0.0
  shifted_correlation: float = 0.05
  occlusion: float = 0.0
  view_jitter: float = 0.5
  noise: float = 0.02

  def __post_init__(self):
    for name, (low, high) in _RANGES.items():
      value = getattr(self, name)
      if not low <= value <= high:
        raise InputError(f'{name}={value} must be between {low} and {high}')
    if self.least_objects > self.most_objects:
      raise InputError(
        f'least_objects={self.least_objects} must not exceed '
        f'most_objects={self.most_objects}'
      )

  def classes(self, split: Split) -> range:
    """Labels of the classes of a split; `shifted` has those of the test."""
    counts = (self.train_classes, self.validation_classes, self.test_classes)
    position = SPLITS.index('test' if split == 'shifted' else split)
    first = sum(counts[:position])
    return range(first, first + counts[position])

  def correlation(self, split: Split) -> float:
    """Correlation of hue and label in a split."""
    return (
      self.shifted_correlation if split == 'shifted' else self.hue_correlation
    )


PRESETS: dict[str, SceneConfig] = {
  'standard': SceneConfig(),
  'plain': SceneConfig(most_objects=3, view_jitter=0.0, noise=0.0),
  'shortcut': SceneConfig(hue_correlation=0.95),
  'occluded': SceneConfig(least_objects=4, occlusion=0.5),
  'crowded': SceneConfig(least_objects=5, occlusion=0.3),
  'own_objects': SceneConfig(arrangements=1),
}
