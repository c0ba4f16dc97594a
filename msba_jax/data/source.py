"""What a collection of labelled images is, and how it is split by class.

A source is anything with a length and `[i]`, whose labels are known without
decoding an image. Retrieval is evaluated on classes that training never saw,
so splits here are by class; images are held out of training classes only where
classification is measured as well.

Attributes:
  Record: one decoded image with its label.
  Source: the protocol.
  Fingerprinted: a source that can say what its pictures depend on.
  Evaluation: queries and the gallery they are answered from.
  Splits: training, validation and test.
  SubsetSource: some images of a source, its classes numbered anew.
  random_order: names in a random order that depends on them and the seed.
  keep_classes: the images of the named classes.
  keep_images: a share of the images of every class.
  check_share: whether such a share can be taken.
  hold_out_classes: a class-disjoint split.
  hold_out_images: some images of every class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np

from msba_jax.data.errors import InputError


class Record(TypedDict):
  """One image, decoded.

  Attributes:
    image: uint8, (height, width, 3), RGB.
    label: index into the source's `class_names`.
  """

  image: np.ndarray
  label: int


@runtime_checkable
class Source(Protocol):
  """A collection of labelled images."""

  @property
  def labels(self) -> np.ndarray:
    """Labels of all images, (len,) int32; nothing is decoded for them."""
    ...

  @property
  def class_names(self) -> tuple[str, ...]:
    """Names of the classes; a label is an index into them."""
    ...

  @property
  def ids(self) -> Sequence[str]:
    """Name of each image: stable and unique in the source."""
    ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


@runtime_checkable
class Fingerprinted(Protocol):
  """A source that knows what its decoded pictures depend on."""

  def fingerprint(self) -> str:
    """Hexadecimal SHA-256 over ids, labels, sizes and dates of the files."""
    ...


class Evaluation(NamedTuple):
  """What is asked, and what answers.

  Attributes:
    queries: the images that ask.
    gallery: the images that answer, with the same `class_names`; None means
      that the queries answer each other and no image answers itself.
  """

  queries: Source
  gallery: Source | None


class Splits(NamedTuple):
  """The parts of an experiment; only `train` and `seen` share classes.

  Attributes:
    train: the images to learn from.
    validation: the classes on which choices are made.
    test: the classes that are looked at once.
    seen: images of the training classes, with the same labels, that were held
      out of the training: for classification. None where none were.
  """

  train: Source
  validation: Evaluation
  test: Evaluation
  seen: Evaluation | None = None


class SubsetSource:
  """Some images of a source, with the classes numbered anew from 0.

  Args:
    source: where the images come from.
    indices: which images, in this order.
    classes: labels in `source` that are kept as classes 0, 1, … in this
      order; None takes those that occur among the images, ascending. Queries
      and gallery share their classes by naming them here.

  Raises:
    ValueError: an index is outside the source, or an image has a class that
      is not among `classes`.
  """

  def __init__(
    self,
    source: Source,
    indices: np.ndarray | Sequence[int],
    *,
    classes: Sequence[int] | np.ndarray | None = None,
  ):
    self._source = source
    self._indices = np.asarray(indices, np.int64).reshape(-1)
    outside = (self._indices < 0) | (self._indices >= len(source))
    if outside.any():
      raise ValueError(
        f'index {self._indices[outside][0]} is outside a source of '
        f'{len(source)} images'
      )
    old = source.labels[self._indices]
    kept = np.unique(old) if classes is None else np.asarray(classes, np.int64)
    renumber = np.full(len(source.class_names), -1, np.int32)
    renumber[kept] = np.arange(len(kept), dtype=np.int32)
    self.labels = renumber[old]
    if (self.labels < 0).any():
      missing = source.class_names[int(old[self.labels < 0][0])]
      raise ValueError(f'an image has class {missing!r}, which is not kept')
    self.class_names = tuple(source.class_names[int(c)] for c in kept)
    self.ids = tuple(source.ids[i] for i in self._indices.tolist())

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Record:
    image = self._source[int(self._indices[index])]['image']
    return Record(image=image, label=int(self.labels[index]))

  def fingerprint(self) -> str:
    """Hexadecimal SHA-256 over the source and what is taken from it.

    Raises:
      TypeError: the source below has no fingerprint.
    """
    if not isinstance(self._source, Fingerprinted):
      raise TypeError(f'{type(self._source).__name__} has no fingerprint()')
    digest = hashlib.sha256(self._source.fingerprint().encode())
    digest.update(self._indices.tobytes())
    digest.update(self.labels.tobytes())
    return digest.hexdigest()


def random_order(names: Sequence[str], *, seed: int) -> np.ndarray:
  """Puts names in a random order that is a function of them and the seed.

  The order is that of SHA-256(seed, name): it is the same for every version
  of NumPy, and a name that is added or left out moves no other.

  Args:
    names: of classes, or the ids of images.
    seed: another seed gives another order.

  Returns:
    A permutation of range(len(names)), (c,) int64.

  Example:
    >>> random_order(['ant', 'bee', 'cat'], seed=0).tolist()
    [2, 0, 1]
  """
  digests = [
    hashlib.sha256(f'{seed}\0{name}'.encode()).digest() for name in names
  ]
  order = sorted(range(len(names)), key=lambda c: digests[c])
  return np.asarray(order, np.int64)


def keep_classes(
  source: Source, classes: Sequence[int] | np.ndarray
) -> SubsetSource:
  """The images of the given classes, which are numbered anew, ascending.

  Args:
    source: where the images come from.
    classes: labels in `source`; each must have an image.

  Returns:
    A view of the source.
  """
  classes = np.unique(np.asarray(classes, np.int64))
  indices = np.flatnonzero(np.isin(source.labels, classes))
  return SubsetSource(source, indices, classes=classes)


def keep_images(source: Source, share: float, *, seed: int) -> Source:
  """Keeps a share of the images of every class, but at least two.

  Which ones is a function of their ids and the seed, as in `random_order`: a
  smaller share is a part of a larger one.

  Args:
    source: where the images come from.
    share: of the images of each class, above 0; 1 keeps the source as it is.
    seed: another seed keeps others.

  Returns:
    A view of the source in its order, with all of its classes. A class with
    fewer than two images keeps what it has.

  Raises:
    InputError: the share is not above 0, or above 1.
  """
  check_share(share)
  if share == 1:
    return source
  kept = np.zeros(len(source), bool)
  classes = range(len(source.class_names))
  for label in classes:
    members = np.flatnonzero(source.labels == label)
    ids = [source.ids[i] for i in members.tolist()]
    count = max(2, round(share * len(members)))
    kept[members[random_order(ids, seed=seed)[:count]]] = True
  return SubsetSource(source, np.flatnonzero(kept), classes=classes)


def check_share(share: float) -> None:
  """Raises an error where a share of the images cannot be taken.

  Args:
    share: as the field `train_share` of a data configuration says it.

  Raises:
    InputError: the share is not above 0, or above 1.
  """
  if not 0 < share <= 1:
    raise InputError(f'train_share={share} must be above 0 and at most 1')


def hold_out_classes(
  source: Source, count: int, *, seed: int
) -> tuple[SubsetSource, SubsetSource]:
  """Splits a source so that the two parts share no class.

  Args:
    source: what to split.
    count: how many classes to hold out.
    seed: chooses which, see `random_order`.

  Returns:
    (the rest, the classes held out).

  Raises:
    InputError: there are not more than `count` classes.
  """
  number = len(source.class_names)
  if not 0 < count < number:
    raise InputError(
      f'{count} classes cannot be held out of {number}: choose 1 to '
      f'{number - 1}'
    )
  order = random_order(source.class_names, seed=seed)
  return keep_classes(source, order[count:]), keep_classes(
    source, order[:count]
  )


def hold_out_images(
  source: Source, count: int, *, seed: int
) -> tuple[SubsetSource, SubsetSource]:
  """Takes some images of every class out of a source.

  Which ones is a function of their ids and the seed, as in `random_order`.

  Args:
    source: what to split.
    count: how many images of each class to hold out.
    seed: another seed chooses others.

  Returns:
    (the rest, the images held out), both with all classes of the source.

  Raises:
    InputError: a class would be left with fewer than two images.
  """
  held = np.zeros(len(source), bool)
  classes = range(len(source.class_names))
  for label in classes:
    members = np.flatnonzero(source.labels == label)
    if not 0 < count <= len(members) - 2:
      raise InputError(
        f'{count} images cannot be held out of the {len(members)} of class '
        f'{source.class_names[label]!r}: two must be left, choose fewer'
      )
    ids = [source.ids[i] for i in members.tolist()]
    held[members[random_order(ids, seed=seed)[:count]]] = True
  return (
    SubsetSource(source, np.flatnonzero(~held), classes=classes),
    SubsetSource(source, np.flatnonzero(held), classes=classes),
  )
