r"""The k best of a stream of scores, for processors with caches.

Scores come in tiles that a cache holds, candidates in rows and queries in
columns, and are never stored. A query knows a floor that k candidates have
reached already; one bit a score says whether it lies above. Those few are read
bit by bit, for all queries at once, into a reservoir of a few hundred places
for each query, and only when it is full are its k best sorted out, which
raises the floor. After i tiles in random order about k / i scores of the next
one pass, so most of the time goes into the products.

Attributes:
  MAX_TILE: the most candidates that a tile may have.
  Reservoir: what has passed the floor.
  comparable: scores that sort by value alone.
  reservoir: an empty one.
  pour: adds a tile.
  drain: the k best.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

__all__ = [
  'MAX_TILE',
  'Reservoir',
  'comparable',
  'drain',
  'pour',
  'reservoir',
]

# A word of bits holds this many candidates, and one more word says which of
# the words are not empty.
WORD = 32
MAX_TILE = WORD * WORD

# Places beyond three times k: more are filled with candidates that a higher
# floor would have kept out, fewer are sorted out too often.
ROOM = 256


T = TypeVar('T')


class Reservoir(NamedTuple):
  """Candidates of every query, equal scores by rising index.

  Attributes:
    scores: of the candidates; minus infinity is no candidate.
    indices: their positions.
    filled: the places in use; what lies behind is left over.
    floor: a score that k candidates have reached; what does not exceed it
      cannot be among the k best any more.
  """

  scores: Float[Array, 'places q']
  indices: Int[Array, 'places q']
  filled: Int[Array, '']
  floor: Float[Array, ' q']


def reservoir(k: int, count: int) -> Reservoir:
  """An empty reservoir.

  Args:
    k: how many of the best will be asked for.
    count: the number of queries.

  Returns:
    The reservoir that `pour` and `drain` take with the same k.
  """
  shape = (3 * k + ROOM, count)
  return Reservoir(
    jnp.full(shape, -jnp.inf, jnp.float32),
    jnp.full(shape, -1, jnp.int32),
    jnp.zeros((), jnp.int32),
    jnp.full(count, -jnp.inf, jnp.float32),
  )


def pour(
  best: Reservoir,
  scores: Float[Array, 'm q'],
  begin: Int[Array, ''],
  *,
  k: int,
  allowed: Bool[Array, ' m'],
  exclude: Int[Array, ' q'],
) -> Reservoir:
  """Adds the candidates of a tile that are above the floor.

  Args:
    best: what tiles of lower indices have left.
    scores: of a tile; m is a multiple of 32 and at most `MAX_TILE`.
    begin: the index of the first candidate.
    k: how many of the best will be asked for.
    allowed: False keeps a candidate from all queries.
    exclude: an index that is no candidate of the query.

  Returns:
    The reservoir with the tile.
  """
  words = _packed((scores > best.floor[None]) & allowed[:, None])
  most = _most(words)
  room = len(best.scores) - k

  # Nearly everything is above the floor of the first tile, and of every tile
  # where the scores rise with the index: then sorting is cheaper.
  many = most > room
  best = _when(
    many,
    lambda best: _sort(best, scores, begin, k, allowed, exclude),
    best,
  )
  most = jnp.where(many, 0, most)
  best = _when(
    best.filled + most > len(best.scores),
    lambda best: _put(best, *_best(_used(best), best.indices, k)),
    best,
  )

  def add(_: Array, state: tuple[_Cursor, Reservoir]):
    cursor, best = state
    cursor, row, found = _next(cursor, words)
    index = begin + row
    score = jnp.take_along_axis(
      scores, row[None], axis=0, mode='promise_in_bounds'
    )[0]
    score = comparable(score, found & (index != exclude))
    place = (best.filled, jnp.zeros_like(best.filled))
    update = jax.lax.dynamic_update_slice
    return cursor, Reservoir(
      update(best.scores, score[None], place),
      update(best.indices, index[None], place),
      best.filled + 1,
      best.floor,
    )

  return jax.lax.fori_loop(0, most, add, (_cursor(words), best))[1]


def drain(
  best: Reservoir, k: int
) -> tuple[Float[Array, 'q k'], Int[Array, 'q k']]:
  """The k best of every query, best first, equal scores by rising index.

  Args:
    best: what all tiles have left.
    k: how many are asked for.

  Returns:
    Scores and indices; minus infinity and −1 where there is none left.
  """
  scores, indices = _best(_used(best), best.indices, k)
  return scores.T, jnp.where(scores > -jnp.inf, indices, -1).T


def comparable(scores: Array, allowed: Array) -> Array:
  """Minus infinity for no candidate, and only one zero."""
  scores = jnp.where(allowed & (scores > -jnp.inf), scores, -jnp.inf)
  # Sorting puts −0 below +0, which would break a tie by something else.
  return jnp.where(scores == 0, 0.0, scores)


def _used(best: Reservoir) -> Array:
  """The scores, without what is left over behind them."""
  places = jnp.arange(len(best.scores))[:, None]
  return jnp.where(places < best.filled, best.scores, -jnp.inf)


def _best(scores: Array, indices: Array, k: int) -> tuple[Array, Array]:
  """The first k places after a stable sort downwards."""
  scores, places = jax.lax.top_k(scores.T, k)
  return scores.T, jnp.take_along_axis(indices.T, places, axis=1).T


def _put(best: Reservoir, scores: Array, indices: Array) -> Reservoir:
  """The reservoir with nothing but its k best, whose last is the floor."""
  return Reservoir(
    jax.lax.dynamic_update_slice_in_dim(best.scores, scores, 0, 0),
    jax.lax.dynamic_update_slice_in_dim(best.indices, indices, 0, 0),
    jnp.full_like(best.filled, len(scores)),
    scores[-1],
  )


def _sort(
  best: Reservoir,
  scores: Array,
  begin: Array,
  k: int,
  allowed: Array,
  exclude: Array,
) -> Reservoir:
  """What `pour` does, for any number of candidates above the floor."""
  indices = begin + jnp.arange(len(scores), dtype=jnp.int32)[:, None]
  scores = comparable(scores, allowed[:, None] & (indices != exclude[None]))
  indices = jnp.broadcast_to(indices, scores.shape)
  return _put(
    best,
    *_best(
      jnp.concatenate([_used(best), scores]),
      jnp.concatenate([best.indices, indices]),
      k,
    ),
  )


def _when(condition: Array, function: Callable[[T], T], value: T) -> T:
  """`function(value)` under a condition, in place: `cond` would copy."""
  return jax.lax.while_loop(
    lambda state: state[0],
    lambda state: (jnp.zeros_like(state[0]), function(state[1])),
    (condition, value),
  )[1]


class _Cursor(NamedTuple):
  """Where the reading of the bits of every query has come to.

  Attributes:
    later: which words behind this one have bits, the first one highest.
    word: the bits that are left of this word, the first one highest.
    place: which word this is.
  """

  later: UInt[Array, ' q']
  word: UInt[Array, ' q']
  place: UInt[Array, ' q']


def _bit(place: int) -> Array:
  return jnp.uint32(1 << (WORD - 1 - place))


def _packed(tests: Bool[Array, 'm q']) -> UInt[Array, 'words q']:
  """One bit a test. Written out, because a reduction is not vectorised."""
  tests = tests.reshape(-1, WORD, tests.shape[1])
  bits = [jnp.where(tests[:, i], _bit(i), 0) for i in range(WORD)]
  return functools.reduce(jnp.bitwise_or, bits)


def _most(words: UInt[Array, 'words q']) -> Int[Array, '']:
  """How many bits the query has that has most."""
  counts = functools.reduce(jnp.add, map(jax.lax.population_count, words))
  return jnp.max(counts).astype(jnp.int32)


def _cursor(words: UInt[Array, 'words q']) -> _Cursor:
  """A cursor before the first bit."""
  later = [jnp.where(x != 0, _bit(i), 0) for i, x in enumerate(words)]
  nothing = jnp.zeros_like(words[0])
  return _Cursor(functools.reduce(jnp.bitwise_or, later), nothing, nothing)


def _next(
  cursor: _Cursor, words: UInt[Array, 'words q']
) -> tuple[_Cursor, Int[Array, ' q'], Bool[Array, ' q']]:
  """The cursor behind the next bit, its row, and whether there was one."""
  later, word, place = cursor
  ahead = jax.lax.clz(later)
  fresh = jnp.take_along_axis(
    words,
    jnp.minimum(ahead, len(words) - 1).astype(jnp.int32)[None],
    axis=0,
    mode='promise_in_bounds',
  )[0]
  read = word == 0
  place = jnp.where(read, ahead, place)
  word = jnp.where(read, jnp.where(later != 0, fresh, 0), word)
  later = jnp.where(read, _without(later, ahead), later)
  found = word != 0
  bit = jax.lax.clz(word)
  row = jnp.where(found, place * WORD + bit, 0).astype(jnp.int32)
  return _Cursor(later, _without(word, bit), place), row, found


def _without(word: UInt[Array, ' q'], place: UInt[Array, ' q']) -> Array:
  return word & ~jax.lax.shift_right_logical(
    jnp.full_like(place, _bit(0)), place
  )
