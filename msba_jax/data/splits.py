"""From a collection with parts to training, validation and test by class.

Data sets come in three shapes: their splits share no class (made for
retrieval), their splits share classes (made for classification), or they have
no splits. Retrieval wants the first; this module makes it of the others.

Attributes:
  ClassSplit: the ways to do it.
  SplitNames: what a data set calls its splits.
  SplitData: the part that the configurations of all data sets share.
  make_splits: divides by class.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np

from msba_jax.data.cached import cached
from msba_jax.data.errors import InputError
from msba_jax.data.images import Interpolation
from msba_jax.data.source import (
  Evaluation,
  Source,
  Splits,
  SubsetSource,
  check_share,
  hold_out_classes,
  hold_out_images,
  keep_classes,
  keep_images,
  random_order,
)

ClassSplit = Literal['auto', 'own', 'random', 'first']
"""How classes are divided.

`own`: the data set's own splits, an error where they share a class.
`random`: all images together, a fraction of the classes, chosen by the seed, is
the test split. `first`: the same, but the first classes in the data set's order
train and the last ones test, as is customary for CUB, Cars and SOP. `auto`:
`own` where the splits share no class, else `random`, with a line in the log.
"""

_LOG = logging.getLogger(__name__)
_VALIDATION = ('validation', 'val')


@dataclasses.dataclass(frozen=True)
class SplitNames:
  """What a data set calls its own splits."""

  train: str = 'train'
  """The training split."""

  test: str = 'test'
  """The split whose images are compared with each other."""

  validation: str | None = None
  """The validation split; default: validation or val, if there."""

  query: str = 'query'
  """The images that ask, where there is no test split."""

  gallery: str = 'gallery'
  """The images that answer, where there is no test split."""

  def all(self) -> set[str]:
    """Every name that a split may have."""
    own = {self.train, self.test, self.query, self.gallery}
    return (
      own
      | set(_VALIDATION if self.validation is None else ())
      | ({self.validation} if self.validation else set())
    )

  def roles(
    self, found: Collection[str], *, where: str, needed: bool = True
  ) -> dict[str, str]:
    """Which split plays which part.

    Args:
      found: the splits that there are.
      where: what an error calls the data set.
      needed: whether a missing split is an error.

    Returns:
      From names to `train`, `validation`, and `test` or `query`, `gallery`.

    Raises:
      InputError: a split is missing.
    """
    wanted = {self.train: 'train'}
    if self.test in found or not {self.query, self.gallery} & set(found):
      wanted[self.test] = 'test'
    else:
      wanted |= {self.query: 'query', self.gallery: 'gallery'}
    if self.validation is not None:
      wanted[self.validation] = 'validation'
    else:
      there = [n for n in _VALIDATION if n in found and n not in wanted]
      wanted |= dict.fromkeys(there[:1], 'validation')
    missing = [name for name in wanted if name not in found]
    if missing and needed:
      raise InputError(
        f'{where} has no split {missing[0]!r} (it has '
        f'{", ".join(sorted(found)[:8]) or "none"}): rename one, set '
        f'splits.{wanted[missing[0]]} to its name, or divide all images by '
        "class_split='random'"
      )
    return {n: role for n, role in wanted.items() if n in found}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitData:
  """How the images of a data set are read and divided."""

  size: int = 64
  """Images are cropped to their central square and resized to this side."""

  interpolation: Interpolation = 'bicubic'
  """The filter of the resizing."""

  validation_classes: int = 15
  """Training classes held out for validation where there is no such split."""

  held_out_images: int = 0
  """Images of every training class held out of the training, for the split
  seen: classification. 0 trains on all."""

  train_share: float = 1.0
  """Share of the images of every training class that are trained on, at least
  two; a smaller share is a part of a larger one. No other split changes."""

  class_split: ClassSplit = 'auto'
  """own: the data set's splits, an error if training and test share classes.
  random: the classes of all images, divided by the seed. first: the first
  classes train, the last ones test. auto: own where possible, else random."""

  test_fraction: float = 0.5
  """Share of the classes that random and first test on."""

  seed: int = 0
  """Chooses the classes and images that are held out or left out."""

  cache: bool = False
  """Decode every image once and keep all of them in memory."""

  cache_dir: str | None = None
  """Keep the decoded images in this folder, for the next time as well."""

  def __post_init__(self):
    check_share(self.train_share)

  @property
  def own_splits(self) -> bool:
    """Whether the data set's own splits may be used."""
    return self.class_split in ('auto', 'own')

  def divide(
    self, source: Source, parts: Mapping[str, np.ndarray], *, name: str
  ) -> Splits:
    """Caches a source if wanted, and divides it by `make_splits`."""
    return make_splits(
      cached(source, keep=self.cache, directory=self.cache_dir),
      parts,
      name=name,
      class_split=self.class_split,
      test_fraction=self.test_fraction,
      validation_classes=self.validation_classes,
      held_out_images=self.held_out_images,
      train_share=self.train_share,
      seed=self.seed,
    )


def make_splits(
  source: Source,
  parts: Mapping[str, np.ndarray],
  *,
  name: str,
  class_split: ClassSplit = 'auto',
  test_fraction: float = 0.5,
  validation_classes: int = 15,
  held_out_images: int = 0,
  train_share: float = 1.0,
  seed: int = 0,
) -> Splits:
  """Divides a collection so that training, validation and test share no class.

  The data set's own validation split is used where its classes are its own;
  where it shares them with the training split the two are joined. Without one,
  `validation_classes` of the training classes become validation.

  Args:
    source: all images.
    parts: which images belong to the data set's own `train`, `validation`,
      and `test` or both of `query` and `gallery`. Empty if it has no splits.
    name: what errors and the log call the data set.
    class_split: see `ClassSplit`.
    test_fraction: share of the classes that `random` and `first` test on.
    validation_classes: how many training classes become validation.
    held_out_images: how many images of every class that trains are held out
      as `seen`.
    train_share: share of the others that train, see `keep_images`.
    seed: chooses classes and images, see `random_order`.

  Returns:
    The splits. Queries and gallery share their class numbers.

  Raises:
    InputError: the classes cannot be divided so.
  """
  if class_split == 'auto':
    shared = _shared(source, parts)
    class_split = 'random' if shared or not parts else 'own'
    if shared:
      _LOG.warning(
        '%s: its training and test splits share %d classes; all images are '
        'divided anew by class (class_split=%r, seed=%d)',
        name,
        len(shared),
        class_split,
        seed,
      )
  if class_split == 'own':
    train, test, validation = _own(source, parts, name)
  else:
    train, held = _divide(
      source, class_split, test_fraction, seed=seed, name=name
    )
    test, validation = Evaluation(held, None), None
  if validation is None:
    if not 0 < validation_classes < len(train.class_names):
      raise InputError(
        f'{name}: validation_classes={validation_classes} must be at least 1 '
        f'and less than the {len(train.class_names)} training classes'
      )
    train, held = hold_out_classes(train, validation_classes, seed=seed)
    validation = Evaluation(held, None)
  seen = None
  if held_out_images:
    train, held = hold_out_images(train, held_out_images, seed=seed)
    seen = Evaluation(held, None)
  train = keep_images(train, train_share, seed=seed)
  return Splits(train, validation, test, seen)


def _classes(source: Source, *parts: np.ndarray) -> set[int]:
  return {int(c) for part in parts for c in np.unique(source.labels[part])}


def _test_parts(parts: Mapping[str, np.ndarray]) -> list[np.ndarray]:
  return [parts[k] for k in ('test', 'query', 'gallery') if k in parts]


def _shared(source: Source, parts: Mapping[str, np.ndarray]) -> set[int]:
  """Classes of the test split that training or validation also has."""
  learnt = [parts[k] for k in ('train', 'validation') if k in parts]
  return _classes(source, *learnt) & _classes(source, *_test_parts(parts))


def _own(
  source: Source, parts: Mapping[str, np.ndarray], name: str
) -> tuple[SubsetSource, Evaluation, Evaluation | None]:
  """The data set's own splits."""
  if 'train' not in parts or not _test_parts(parts):
    raise InputError(
      f"{name} has no splits of its own: set class_split to 'random' or 'first'"
    )
  shared = _shared(source, parts)
  if shared:
    example = source.class_names[min(shared)]
    raise InputError(
      f'{name}: training and test share {len(shared)} classes, as '
      f"{example!r}: set class_split to 'random' or 'first'"
    )
  if 'test' in parts:
    test = Evaluation(SubsetSource(source, parts['test']), None)
  else:
    classes = sorted(_classes(source, parts['query'], parts['gallery']))
    alone = set(classes) - _classes(source, parts['gallery'])
    if alone:
      raise InputError(
        f'{name}: class {source.class_names[min(alone)]!r} is asked for but '
        'not in the gallery: add an image of it or remove its queries'
      )
    test = Evaluation(
      SubsetSource(source, parts['query'], classes=classes),
      SubsetSource(source, parts['gallery'], classes=classes),
    )
  train, validation = parts['train'], parts.get('validation')
  if validation is None:
    return SubsetSource(source, train), test, None
  if _classes(source, train) & _classes(source, validation):
    _LOG.warning(
      '%s: its training and validation splits share classes; they are joined '
      'and validation classes are held out of both',
      name,
    )
    joined = np.concatenate([train, validation])
    return SubsetSource(source, joined), test, None
  return (
    SubsetSource(source, train),
    test,
    Evaluation(SubsetSource(source, validation), None),
  )


def _divide(
  source: Source,
  class_split: ClassSplit,
  test_fraction: float,
  *,
  seed: int,
  name: str,
) -> tuple[SubsetSource, SubsetSource]:
  """All images, divided into (training, test) by class."""
  present = np.unique(source.labels)
  number = len(present)
  count = round(number * test_fraction)
  if not 0 < count < number:
    raise InputError(
      f'{name}: test_fraction={test_fraction} leaves {count} of {number} '
      'classes to test and the others to train: each needs one'
    )
  if class_split == 'random':
    names = [source.class_names[c] for c in present.tolist()]
    present = present[random_order(names, seed=seed)[::-1]]
  return (
    keep_classes(source, present[: number - count]),
    keep_classes(source, present[number - count :]),
  )
