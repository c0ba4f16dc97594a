"""English sentences about a scene, made from its graph.

Attributes:
  describe: several captions of one scene.
"""

from __future__ import annotations

from collections.abc import Sequence

from msba_jax.data.scenes.objects import Edge, SceneObject
from msba_jax.data.scenes.templates import HUES

_VERBS = {
  'left of': ('is left of', 'is to the left of', 'stands left of'),
  'above': ('is above', 'sits above', 'is placed above'),
  'inside': ('is inside', 'lies inside', 'is found inside'),
  'larger than': ('is larger than', 'is bigger than', 'looks larger than'),
  'in front of': ('is in front of', 'partly hides', 'covers part of'),
}
_INVERSES = {
  'left of': 'is right of',
  'above': 'is below',
  'inside': 'contains',
  'larger than': 'is smaller than',
  'in front of': 'is behind',
}
_NUMBERS = ('no', 'one', 'two', 'three', 'four', 'five', 'six')


def describe(
  objects: Sequence[SceneObject],
  graph: Sequence[Edge],
  hue: int,
  *,
  variant: int,
) -> tuple[str, ...]:
  """Captions of one scene.

  Args:
    objects: from back to front.
    graph: the relations; the first is that of the class.
    hue: of the background, an index into `HUES`.
    variant: chooses words and, for the last caption, a relation.

  Returns:
    The relation of the class: plain, turned round, and with all attributes;
    then a list of the objects; then some other relation of the scene, or the
    first again where there is none.

  Example:
    >>> dot = SceneObject('circle', 'red', 'small', 'plain', 0.2, 0.5, 0.1, 0.0)
    >>> box = dot._replace(shape='square', colour='blue', x=0.8)
    >>> describe([dot, box], [Edge(0, 'left of', 1)], 0, variant=0)[1]
    'The blue square is right of the red circle.'
  """
  first = graph[0]
  other = graph[1 + variant % (len(graph) - 1)] if len(graph) > 1 else first
  number = _NUMBERS[len(objects)]
  names = [_article(_full(thing)) for thing in objects]
  return (
    _say(first, objects, variant),
    f'The {objects[first.target].kind} {_INVERSES[first.relation]} '
    f'the {objects[first.subject].kind}.',
    _say(first, objects, variant + 1, full=True)[:-1]
    + f', on {_article(HUES[hue])} background.',
    f'A picture of {number} objects: '
    + ', '.join(names[:-1])
    + f' and {names[-1]}.',
    _say(other, objects, variant + 2),
  )


def _say(
  edge: Edge,
  objects: Sequence[SceneObject],
  variant: int,
  *,
  full: bool = False,
) -> str:
  verbs = _VERBS[edge.relation]
  verb = verbs[variant % len(verbs)]
  subject, target = (
    _article(_full(objects[i]) if full else str(objects[i].kind))
    for i in (edge.subject, edge.target)
  )
  return f'{subject[0].upper()}{subject[1:]} {verb} {target}.'


def _full(thing: SceneObject) -> str:
  """All attributes of an object."""
  texture = '' if thing.texture == 'plain' else f'{thing.texture} '
  return f'{thing.size} {texture}{thing.kind}'


def _article(name: str) -> str:
  return f'an {name}' if name[0] in 'aeiou' else f'a {name}'
