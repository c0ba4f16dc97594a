"""Does CASTLE find who depends on whom, when that is known and never told?

    python benchmarks/known_graph.py [--seeds 0 1 2] [--systems castle msba]

Images are two grids of features, 4 x 4 and 2 x 2. The upper half of a grid is a
code of the instance; the lower half shows the code of the class in a giver and
something meaningless in a receiver, which has copied the upper half of one
giver and has its class: it can only be classified by reading from there, while
a giver needs nobody. On top lies one of a few styles, which images share
without any cause. Givers have 0 to 2 receivers and classes of their own,
so that nobody else in the batch shows the class; instances are new each step.

Training sees classes, never edges. Its batches come in groups of families,
a giver and its receivers, who see only each other: one family a group at first,
at the end all in one. No edge is told, but who belongs together is, for a
while: in all trials without groups, of other settings and 400 to 800 steps, the
graph found nothing. The effect loss contrasts with uniform weights.

The strength of the styles sets how well raw similarity does: it is a choice, as
are rate, steps and acyclicity, which were chosen for CASTLE on seed 0.

Printed for each score of ordered pairs (n, m), on fresh batches without groups:

- edges: AUROC of n <- m against all other pairs;
- confounded: the same against the pairs that are as similar as those joined by
  an edge, which are the reversed edges and the receivers of one giver;
- direction: AUROC of S[n, m] - S[m, n], pairs joined by an edge in both orders;
- distance: the structural Hamming distance of S above a threshold chosen on
  other batches; a missing, a superfluous and a reversed edge count one each.
"""

import argparse
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import machine

from msba_jax.layers.normalize import safe_normalize
from msba_jax.losses import msba_losses, normalized_softmax, total_loss
from msba_jax.losses.causal import castle_losses
from msba_jax.losses.proxies import proxy_cosines
from msba_jax.models.backbones.precomputed import Precomputed
from msba_jax.models.castle import castle
from msba_jax.models.context import batch as batch_context
from msba_jax.models.msba import msba

SIDE, WIDTH = 4, 64
HALF = SIDE * SIDE // 2
CLASSES, STYLES = 48, 8
GIVERS = RECEIVERS = 24
IMAGES = GIVERS + RECEIVERS
EVERYBODY = np.ones(IMAGES, bool)
APART = -3e4  # below the bias of an image towards itself
CHUNK = 50
SYSTEMS = {
  'castle': castle,
  'castle, no gate': functools.partial(castle, gate=False),
  'castle, no effect': functools.partial(castle, effect=False),
  'msba': msba,
}
# Student's t, 97.5 %, by the number of seeds.
QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447}


class World(NamedTuple):
  """What stays: codes of classes and styles, how strong style and noise are."""

  classes: jax.Array
  styles: jax.Array
  style: float
  noise: float


class Batch(NamedTuple):
  """Grids, labels, the true graph, who receives, and of which family."""

  grids: tuple[jax.Array, jax.Array]
  labels: jax.Array
  edges: jax.Array
  receives: jax.Array
  family: jax.Array


def codes(key, count):
  return jax.nn.relu(jax.random.normal(key, (count, 1, WIDTH)))


def make_world(seed, style, noise):
  keys = jax.random.split(jax.random.fold_in(jax.random.key(1), seed))
  return World(codes(keys[0], CLASSES), codes(keys[1], STYLES), style, noise)


def draw(key, world):
  """A batch of new instances in random order."""
  keys = jax.random.split(key, 7)
  slots = jnp.repeat(jnp.arange(GIVERS), 2)
  givers = jax.random.permutation(keys[0], slots)[:RECEIVERS]
  family = jnp.concatenate([jnp.arange(GIVERS), givers])
  labels = jax.random.permutation(keys[1], CLASSES)[family]
  receives = jnp.arange(IMAGES) >= GIVERS
  lower = jnp.where(
    receives[:, None, None], codes(keys[2], IMAGES), world.classes[labels]
  )
  halves = jnp.stack([codes(keys[3], GIVERS)[family], lower], axis=1)
  styles = jax.random.randint(keys[4], (IMAGES,), 0, STYLES)
  grid = jnp.repeat(halves[:, :, 0], HALF, axis=1)
  grid = grid + world.style * world.styles[styles]
  grid = grid + world.noise * jax.random.normal(keys[5], grid.shape)
  edges = receives[:, None] & ~receives & (family[:, None] == family)
  order = jax.random.permutation(keys[6], IMAGES)
  fine = grid[order].reshape(IMAGES, SIDE, SIDE, WIDTH)
  half = SIDE // 2
  coarse = fine.reshape(IMAGES, half, 2, half, 2, WIDTH).mean(axis=(2, 4))
  return Batch(
    (fine, coarse),
    labels[order],
    edges[order][:, order],
    receives[order],
    family[order],
  )


def compile_training(model, losses, options):
  """`(params, world, key) → params`, all steps."""
  optimizer = optax.adamw(
    optax.warmup_cosine_decay_schedule(0, options.rate, 50, options.steps),
    weight_decay=1e-2,
  )

  def context_at(step, family):
    span = options.together - options.alone
    grown = (step / options.steps - options.alone) / span
    group = jnp.floor(family / GIVERS ** jnp.clip(grown, 0, 1))
    bias = jnp.where(group[:, None] == group, 0.0, APART)
    return batch_context(EVERYBODY, bias=bias)

  @jax.jit
  def some(state, world, key, start):
    def step(state, number):
      params, moments = state
      drawn, dropout = jax.random.split(jax.random.fold_in(key, number))
      batch = draw(drawn, world)

      def loss_of(params):
        _, out = model.apply(
          {'params': params},
          batch.grids,
          context=context_at(number, batch.family),
          rngs={'dropout': dropout},
        )
        return total_loss(
          losses, out, {'label': batch.labels, 'valid': EVERYBODY}
        )

      gradients, terms = jax.grad(loss_of, has_aux=True)(params)
      updates, moments = optimizer.update(gradients, moments, params)
      return (optax.apply_updates(params, updates), moments), terms

    return jax.lax.scan(step, state, start + jnp.arange(CHUNK))

  def fit(params, world, key):
    state = params, optimizer.init(params)
    for start in range(0, options.steps, CHUNK):
      state, terms = some(state, world, key, start)
    print({name: round(float(x.mean()), 3) for name, x in terms.items()})
    return state[0]

  return fit


def compile_scores(model):
  """`(params, world, key) → (scores by name, edges, facts by name)`."""

  def cosines(vectors):
    units = safe_normalize(vectors.reshape(IMAGES, -1))
    return units @ units.T

  @jax.jit
  def look(params, world, key):
    batch = draw(key, world)
    _, out = model.apply(
      {'params': params}, batch.grids, context=batch_context(EVERYBODY)
    )
    scores = {
      'raw, all tokens': cosines(batch.grids[0]),
      'raw, pooled': cosines(jnp.mean(batch.grids[0], axis=(1, 2))),
      'solo embeddings': cosines(out['solo']),
      'attention A': jnp.mean(out['attention'], axis=(0, 1, 2)),
    }
    graph = out['aux']['graph'].get('graph')
    if graph is not None:
      scores |= {f'W of level {i}': level for i, level in enumerate(graph)}
      scores['W'] = jnp.mean(graph, axis=0)
    told = {'share of the context': out['aux']['caf']['context_share']}
    for stream in ('solo', 'context'):
      found = jnp.argmax(proxy_cosines(out[stream], out['proxies'], None), -1)
      told[f'accuracy in {stream}'] = found == batch.labels
    kinds = {'receivers': batch.receives, 'givers': ~batch.receives}
    facts = {
      f'{kind}, {fact}': jnp.mean(values, where=which)
      for kind, which in kinds.items()
      for fact, values in told.items()
    }
    return scores, batch.edges, facts

  return look


def auroc(scores, positive):
  """By ranks; ties count a half."""
  _, inverse, counts = np.unique(
    scores, return_inverse=True, return_counts=True
  )
  ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
  hits = np.sum(positive)
  above = ranks[positive].sum() - hits * (hits + 1) / 2
  return above / (hits * (len(scores) - hits))


def distance(found, edges):
  """Unordered pairs whose edges are not the true ones, a batch."""
  wrong = found != edges
  return np.sum(wrong | np.swapaxes(wrong, -1, -2)) / 2 / len(edges)


def measure(scores, edges, other_scores, other_edges):
  """The four figures of a score, of batches (b, n, n); others choose."""
  off = ~np.eye(IMAGES, dtype=bool)
  turned = np.swapaxes(edges, -1, -2)
  alike = edges | turned | ((edges.astype(int) @ turned.astype(int)) > 0) & off
  difference = (scores - np.swapaxes(scores, -1, -2))[edges]
  shares = 1 - np.geomspace(1e-4, 0.5, 200)
  threshold = min(
    np.append(np.quantile(other_scores[:, off], shares), np.inf),
    key=lambda x: distance((other_scores > x) & off, other_edges),
  )
  pairs = list(zip(scores, edges, alike, strict=True))
  return {
    'edges': np.mean([auroc(s[off], e[off]) for s, e, _ in pairs]),
    'confounded': np.mean([auroc(s[a], e[a]) for s, e, a in pairs]),
    'direction': auroc(
      np.concatenate([difference, -difference]),
      np.repeat([True, False], len(difference)),
    ),
    'distance': distance((scores > threshold) & off, edges),
  }


def evaluate(look, params, world, count):
  """Figures by score, and facts."""
  keys = jax.random.split(jax.random.key(2), 2 * count)
  seen = [jax.device_get(look(params, world, key)) for key in keys]
  figures = {}
  edges = np.stack([x[1] for x in seen])
  for name in seen[0][0]:
    scores = np.stack([x[0][name] for x in seen]).astype(np.float64)
    figures[name] = measure(
      scores[:count], edges[:count], scores[count:], edges[count:]
    )
  facts = {
    name: float(np.mean([x[2][name] for x in seen[:count]]))
    for name in seen[0][2]
  }
  return figures, facts


def interval(values):
  """Mean over seeds, and the half width of its interval of 95 %."""
  text = f'{np.mean(values):.3f}'
  if len(values) in QUANTILES:
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    text += f' ± {QUANTILES[len(values)] * error:.3f}'
  return text


def show(name, results):
  """Prints the figures of all seeds of a system."""
  print(f'{name}, {len(results)} seeds')
  kinds = 'edges', 'confounded', 'direction', 'distance'
  print(f'  {"score":18s}' + ''.join(f'{kind:>18s}' for kind in kinds))
  for score in results[0][0]:
    cells = (interval([x[score][kind] for x, _ in results]) for kind in kinds)
    print(f'  {score:18s}' + ''.join(f'{cell:>18s}' for cell in cells))
  for fact in results[0][1]:
    print(f'  {fact}: {interval([x[fact] for _, x in results])}')


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2])
  parser.add_argument(
    '--systems', nargs='*', default=['castle', 'msba'], choices=SYSTEMS
  )
  parser.add_argument('--steps', type=int, default=2000)
  parser.add_argument('--rate', type=float, default=2e-3)
  parser.add_argument('--style', type=float, default=0.7)
  parser.add_argument('--noise', type=float, default=0.1)
  parser.add_argument('--alone', type=float, default=0.15)
  parser.add_argument('--together', type=float, default=0.75)
  parser.add_argument('--acyclicity', type=float, default=0.3)
  parser.add_argument('--batches', type=int, default=60)
  options = parser.parse_args()
  print(machine())
  print(
    f'{GIVERS} givers, {RECEIVERS} receivers, {CLASSES} classes; {options}; '
    f'without any edge the distance is {RECEIVERS}'
  )
  for name in options.systems:
    model = SYSTEMS[name](
      Precomputed(), features=64, embedding=64, num_heads=4, num_classes=CLASSES
    )
    losses = msba_losses(normalized_softmax)
    if name != 'msba':
      if model.bcp.contrast is not None:
        model = model.clone(bcp=model.bcp.clone(contrast='uniform'))
      losses = castle_losses(
        normalized_softmax,
        acyclicity=options.acyclicity,
        effect=0.0 if name == 'castle, no effect' else 1.0,
      )
    fit, look = compile_training(model, losses, options), compile_scores(model)
    results = []
    for seed in options.seeds:
      key = jax.random.key(seed)
      world = make_world(seed, options.style, options.noise)
      grids = draw(key, world).grids
      params = jax.jit(model.init)(key, grids)['params']
      print(f'{name}, seed {seed}', flush=True)
      params = fit(params, world, key)
      results.append(evaluate(look, params, world, options.batches))
    show(name, results)


if __name__ == '__main__':
  main()
