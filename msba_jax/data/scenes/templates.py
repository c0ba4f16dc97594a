"""Classes of scenes: a few objects and the relation between two of them.

Classes that share their objects and differ in the relation come in families,
and a family never straddles two splits. All choices are made by SHA-256 of the
seed, so they are the same with every version of NumPy, and asking for more
classes of one split changes no class of another.

Attributes:
  SHAPES: what an object can be.
  COLOURS: what colour it can have.
  SIZES: from small to large.
  TEXTURES: how it can be filled.
  RELATIONS: what can hold between two objects; the first four make classes.
  CONTAINERS: shapes in which another object has room.
  HUES: of the background.
  Kind: shape and colour.
  Template: what defines a class.
  make_templates: the templates of all splits.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from msba_jax.data.scenes.config import SPLITS, SceneConfig

SHAPES = (
  'circle', 'square', 'triangle', 'star', 'hexagon', 'cross', 'heart', 'ring',
)  # fmt: skip
COLOURS = (
  'red', 'orange', 'yellow', 'green', 'teal', 'blue', 'purple', 'pink',
)  # fmt: skip
SIZES = ('small', 'medium', 'large')
TEXTURES = ('plain', 'striped', 'dotted', 'checkered')
RELATIONS = ('left of', 'above', 'inside', 'larger than', 'in front of')
CONTAINERS = ('circle', 'square', 'hexagon', 'ring')
HUES = (
  'red', 'amber', 'lime', 'green', 'cyan', 'blue', 'violet', 'magenta',
)  # fmt: skip

_T = TypeVar('_T')

# Families are dealt to the splits in turn.
_TURNS = ('train', 'train', 'train', 'validation', 'test')


class Kind(NamedTuple):
  """What makes an object recognisable: its shape and its colour."""

  shape: str
  colour: str

  def __str__(self) -> str:
    return f'{self.colour} {self.shape}'


class Template(NamedTuple):
  """A class of scenes.

  Attributes:
    subject: the first object of the relation.
    relation: one of the first four of `RELATIONS`.
    target: the second object of the relation.
    companion: a third object that every scene of the class has, or None.
  """

  subject: Kind
  relation: str
  target: Kind
  companion: Kind | None

  @property
  def kinds(self) -> tuple[Kind, ...]:
    """The two or three objects of the class."""
    last = () if self.companion is None else (self.companion,)
    return (self.subject, self.target, *last)

  @property
  def name(self) -> str:
    """The class in words."""
    tail = '' if self.companion is None else f' with {self.companion}'
    return f'{self.subject} {self.relation} {self.target}{tail}'


@functools.lru_cache(maxsize=16)
def make_templates(seed: int, config: SceneConfig) -> tuple[Template, ...]:
  """The templates of all splits; a label is an index into them.

  Args:
    seed: another seed gives other classes.
    config: numbers of classes, of arrangements and of objects.

  Returns:
    The classes of training, then of validation, then of the test.
  """
  kinds = [Kind(*pair) for pair in itertools.product(SHAPES, COLOURS)]
  pairs = [
    (first, second)
    for first, second in itertools.combinations(kinds, 2)
    if first.colour != second.colour
  ]
  dealt: dict[str, list[Template]] = {split: [] for split in SPLITS}
  for turn, pair in enumerate(_shuffle(pairs, f'pairs {seed}')):
    split = _TURNS[turn % len(_TURNS)]
    if len(dealt[split]) < len(config.classes(split)):
      dealt[split] += _family(pair, kinds, seed, config)
  return tuple(
    template
    for split in SPLITS
    for template in dealt[split][: len(config.classes(split))]
  )


def _family(
  pair: tuple[Kind, Kind], kinds: list[Kind], seed: int, config: SceneConfig
) -> list[Template]:
  """Classes with the same objects and different relations between them."""
  salt = f'{seed} {pair[0]} {pair[1]}'
  colours = {kind.colour for kind in pair}
  others = [kind for kind in kinds if kind.colour not in colours]
  companions = (None, _shuffle(others, f'companion {salt}')[0])
  companion = _shuffle(companions, f'third {salt}')[0]
  if config.most_objects < 3:
    companion = None
  family = [
    Template(subject, relation, target, companion)
    for relation in RELATIONS[:4]
    for subject, target in (pair, pair[::-1])
    if relation != 'inside' or target.shape in CONTAINERS
  ]
  return _shuffle(family, f'relations {salt}')[: config.arrangements]


def _shuffle(things: Iterable[_T], salt: str) -> list[_T]:
  return sorted(
    things, key=lambda x: hashlib.sha256(f'{salt} {x}'.encode()).digest()
  )
