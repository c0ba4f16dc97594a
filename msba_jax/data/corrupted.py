"""Sources whose images are damaged before anything else sees them.

Damage is a function of the image, its name and a seed: an image is damaged in
the same way in every batch, by itself or among others, and on every reading.
Two severities of one corruption share their random numbers, so that what
differs between them is the severity.

Attributes:
  Corruption: which damage, and how much.
  choose_corruption: the corruption that two flags name.
  CorruptedSource: a source with damaged images.
  corrupt_evaluation: queries and gallery, both damaged.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import jax
import numpy as np
from jaxtyping import Array

from msba_jax.data.corruptions import CORRUPTIONS, SEVERITIES
from msba_jax.data.errors import InputError
from msba_jax.data.source import Evaluation, Fingerprinted, Record, Source

__all__ = [
  'CorruptedSource',
  'Corruption',
  'choose_corruption',
  'corrupt_evaluation',
]


@dataclasses.dataclass(frozen=True)
class Corruption:
  """Which damage, and how much.

  Attributes:
    name: one of `corruptions.CORRUPTIONS`.
    severity: 1 … 5.

  Raises:
    InputError: there is no such corruption or severity.
  """

  name: str
  severity: int

  def __post_init__(self):
    if self.name not in CORRUPTIONS:
      raise InputError(
        f'--corruption {self.name} is none of {", ".join(CORRUPTIONS)}: choose '
        'one of them'
      )
    if self.severity not in SEVERITIES:
      raise InputError(
        f'--severity {self.severity} is none of '
        f'{", ".join(map(str, SEVERITIES))}: choose one of them'
      )


def choose_corruption(
  name: str | None, severity: int | None
) -> Corruption | None:
  """The corruption that two flags name.

  Args:
    name: of the flag `--corruption`; None leaves images as they are.
    severity: of the flag `--severity`.

  Returns:
    The corruption, or None where neither flag was given.

  Raises:
    InputError: only one of them was, or there is no such corruption or
      severity.
  """
  if name is None and severity is None:
    return None
  if name is None:
    raise InputError(
      f'--severity {severity} needs a --corruption: choose one of '
      f'{", ".join(CORRUPTIONS)}'
    )
  if severity is None:
    raise InputError(
      f'--corruption {name} needs a --severity: choose one of '
      f'{", ".join(map(str, SEVERITIES))}'
    )
  return Corruption(name, severity)


class CorruptedSource:
  """A source with damaged images; labels, classes and ids stay.

  Args:
    source: the sound images.
    corruption: what is done to each of them.
    seed: another seed draws other noise and other places.
  """

  def __init__(self, source: Source, corruption: Corruption, *, seed: int = 0):
    self._source, self._corruption, self._seed = source, corruption, seed
    self.labels = source.labels
    self.class_names = source.class_names
    self.ids = source.ids

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Record:
    """The damaged image.

    Raises:
      InputError: the source has something else than pictures of uint8.
    """
    record = self._source[index]
    image = record['image']
    if getattr(image, 'dtype', None) != np.uint8 or image.ndim != 3:
      raise InputError(
        f'{self.ids[index]} is no picture of uint8 pixels, which --corruption '
        'needs: leave it out, or evaluate on pictures'
      )
    digest = hashlib.sha256(f'{self._seed}\0{self.ids[index]}'.encode())
    damaged = _damage(
      np.frombuffer(digest.digest()[:8], np.uint32),
      image,
      name=self._corruption.name,
      severity=self._corruption.severity,
    )
    return Record(image=np.asarray(damaged), label=record['label'])

  def fingerprint(self) -> str:
    """Hexadecimal SHA-256 over the source and what is done to it.

    Raises:
      TypeError: the source below has no fingerprint.
    """
    if not isinstance(self._source, Fingerprinted):
      raise TypeError(f'{type(self._source).__name__} has no fingerprint()')
    content = f'{self._source.fingerprint()} {self._corruption} {self._seed}'
    return hashlib.sha256(content.encode()).hexdigest()


def corrupt_evaluation(
  evaluation: Evaluation, corruption: Corruption | None, *, seed: int = 0
) -> Evaluation:
  """Damages queries and gallery alike.

  Args:
    evaluation: sound images.
    corruption: what is done to each of them; None does nothing.
    seed: see `CorruptedSource`.

  Returns:
    The same queries and gallery, damaged.
  """
  if corruption is None:
    return evaluation
  queries, gallery = evaluation
  return Evaluation(
    CorruptedSource(queries, corruption, seed=seed),
    None
    if gallery is None
    else CorruptedSource(gallery, corruption, seed=seed),
  )


@functools.partial(jax.jit, static_argnames=('name', 'severity'))
def _damage(words: Array, image: Array, *, name: str, severity: int) -> Array:
  """One corruption with a key made of two words, compiled once a shape."""
  key = jax.random.wrap_key_data(words, impl='threefry2x32')
  return CORRUPTIONS[name](key, image, severity=severity)
