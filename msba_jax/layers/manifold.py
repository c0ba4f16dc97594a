"""Keys of attention on an atlas: charts with scales of their own, aggregated.

The paper's equations could not be read in full. What stands here is our
reconstruction from its abstract, summaries of it and its predecessor. Sources:
A Manifold Representation of the Key in Vision Transformers (2024), arXiv
2402.00534; State Representation Learning Using an Unbalanced Atlas (2023),
arXiv 2305.10267.

Attributes:
  ManifoldParams: scales, chart maps and what the aggregation needs.
  ChartKeys: keys, and how much every chart had a part in them.
  manifold_keys: keys of tokens in one of four variants.
  membership_penalty: pushes memberships away from the uniform ones.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = [
  'ChartKeys',
  'ManifoldParams',
  'Variant',
  'manifold_keys',
  'membership_penalty',
]

Activation = Callable[[Array], Array]
Matmul = Callable[..., Array]
Variant = Literal['vanilla', 'simple', 'unbalanced_atlas', 'spatial']
_NEEDS = {'unbalanced_atlas': 'membership', 'spatial': 'membership kernel'}


class ManifoldParams(NamedTuple):
  """Parameters of `manifold_keys`; q counts the charts.

  Attributes:
    scales: Γ (q, d), near 1.
    charts: A (q, d, width), or B (q, d, rank) where there are factors.
    biases: a (q, width).
    factors: C (q, rank, width), so that A_q = B_q C_q; not for 'vanilla'.
    output: W_o (q · width, f) of 'vanilla'; None leaves the charts side by
      side.
    membership: W (d, q) of 'unbalanced_atlas' and 'spatial'.
    kernel: (3, 3, q) of 'spatial', one filter a chart.
  """

  scales: Array
  charts: Array
  biases: Array
  factors: Array | None = None
  output: Array | None = None
  membership: Array | None = None
  kernel: Array | None = None


class ChartKeys(NamedTuple):
  """What `manifold_keys` returns.

  Attributes:
    keys: (*b, t, f) in the dtype of the inputs.
    memberships: (*b, t, q), float32, rows sum to one; None without a W.
  """

  keys: Array
  memberships: Array | None


def manifold_keys(
  inputs: Float[Array, '*b t d'],
  params: ManifoldParams,
  *,
  variant: Variant,
  activation: Activation | None = jax.nn.gelu,
  grid: tuple[int, int] | None = None,
  prefix: int = 0,
  broadcast_context: bool = False,
  precision: jax.lax.PrecisionLike = None,
) -> ChartKeys:
  r"""Keys from the charts U_q = φ((Γ_q ∘ x) A_q + a_q).

  The variants differ in the key they make of the charts:

      vanilla            concat_q(U_q) W_o
      simple             mean_q U_q
      unbalanced_atlas   Σ_q w_q U_q with w = softmax(x W)
      spatial            Σ_q w_q U_q with w = softmax(conv(x W))

  where conv is a 3 × 3 filter a chart over the grid of the tokens, zero beyond
  its edge. Charts that are summed are made one after another, and again in the
  gradient, so that one is in memory at a time. If they have factors and no
  activation, the sum is part of the product with the factors.

  Args:
    inputs: tokens; the axis t is one image's where there is a grid.
    params: those of the variant and no others.
    variant: how charts become a key.
    activation: φ; None is the identity.
    grid: height and width of the tokens after the prefix, row-major; for
      'spatial' only.
    prefix: number of tokens before the grid (class token, registers); the
      convolution leaves their logits as they are.
    broadcast_context: first replaces x by (x + mean_t x) / 2.
    precision: of the matrix products, as in `jax.lax.dot_general`.

  Returns:
    The keys and, where there are any, the memberships.

  Raises:
    ValueError: an unknown variant, a parameter that it lacks or does not take,
      a wrong shape, or a grid that is missing, superfluous or wrong.

  Example:
    >>> charts = jnp.array([[[1.0]], [[3.0]]])
    >>> params = ManifoldParams(jnp.ones((2, 1)), charts, jnp.zeros((2, 1)))
    >>> inputs = jnp.array([[2.0]])
    >>> manifold_keys(inputs, params, variant='simple', activation=None).keys
    Array([[4.]], dtype=float32)

  Source: our reconstruction of arXiv 2402.00534, see the module. The mean over
  tokens is from Scratching Visual Transformer's Back with Uniform Attention
  (2022), arXiv 2210.08457.
  """
  _check(inputs, params, variant)
  _check_grid(inputs.shape[-2], variant, grid, prefix)
  if broadcast_context:
    inputs = (inputs + jnp.mean(inputs, axis=-2, keepdims=True)) / 2
  # The map of a chart takes its scale, so that x is multiplied only once.
  params = params._replace(charts=params.scales[..., None] * params.charts)
  params = jax.tree.map(lambda x: x.astype(inputs.dtype), params)
  matmul = functools.partial(jnp.matmul, precision=precision)
  apply = activation or jax.nn.identity
  if variant == 'vanilla':
    keys = _side_by_side(inputs, params.charts, matmul)
    keys = apply(_plus(keys, params.biases.ravel()))
    keys = keys if params.output is None else matmul(keys, params.output)
    return ChartKeys(keys, None)
  shares = None
  if params.membership is not None:
    weights = params.membership
    logits = matmul(inputs, weights, preferred_element_type=jnp.float32)
    if params.kernel is not None and grid is not None:
      around = _filtered(logits[..., prefix:, :], params.kernel, grid)
      logits = jnp.concatenate([logits[..., :prefix, :], around], axis=-2)
    shares = jax.nn.softmax(logits, axis=-1)
  if params.factors is not None and activation is None:
    keys = _linear_sum(inputs, params, params.factors, shares, matmul)
  else:
    keys = _sum_of_charts(inputs, params, shares, apply, matmul)
  return ChartKeys(keys.astype(inputs.dtype), shares)


def membership_penalty(
  memberships: Float[Array, '*b t charts'], *, weight: float = -0.1
) -> Float[Array, '*b t']:
  r"""Penalty of every token: weight · Σ_q (w_q − 1/q)².

  With the negative weight it is lowest where one chart has everything.

  Args:
    memberships: as `manifold_keys` gives them.
    weight: factor of the squares.

  Returns:
    One number a token, in the dtype of the memberships.

  Example:
    >>> memberships = jnp.array([[0.25, 0.75], [1.0, 0.0]])
    >>> membership_penalty(memberships, weight=-1.0).tolist()
    [-0.125, -0.5]

  Source: our reconstruction of arXiv 2402.00534, see the module.
  """
  excess = memberships - 1 / memberships.shape[-1]
  return weight * jnp.sum(excess**2, axis=-1)


def _filtered(logits: Array, kernel: Array, grid: tuple[int, int]) -> Array:
  """A 3 × 3 filter a chart: nine shifted maps, faster than a convolution."""
  height, width = grid
  maps = logits.reshape(*logits.shape[:-2], height, width, logits.shape[-1])
  edges = ((1, 1), (1, 1), (0, 0))
  padded = jnp.pad(maps, ((0, 0),) * (maps.ndim - 3) + edges)
  total = jnp.zeros_like(maps)
  for y, x in np.ndindex(3, 3):
    part = padded[..., y : y + height, x : x + width, :]
    total += part * jnp.broadcast_to(kernel[y, x], maps.shape)
  return total.reshape(logits.shape)


def _plus(values: Array, bias: Array) -> Array:
  return values + jnp.broadcast_to(bias, values.shape)


def _side_by_side(inputs: Array, charts: Array, matmul: Matmul) -> Array:
  """(*b, t, q · width): all chart maps in one matrix product."""
  joined = jnp.swapaxes(charts, 0, 1).reshape(charts.shape[1], -1)
  return matmul(inputs, joined)


def _linear_sum(
  inputs: Array,
  params: ManifoldParams,
  factors: Array,
  shares: Array | None,
  matmul: Matmul,
) -> Array:
  """Σ_q w_q (x B_q C_q + a_q) = concat_q(w_q x B_q) C + w a."""
  count, rank, width = factors.shape
  hidden = _side_by_side(inputs, params.charts, matmul)
  joined = factors.reshape(-1, width)
  if shares is None:
    return _plus(matmul(hidden, joined / count), params.biases.mean(axis=0))
  shares = shares.astype(inputs.dtype)
  hidden = hidden * jnp.repeat(shares, rank, axis=-1)
  return matmul(hidden, joined) + matmul(shares, params.biases)


def _sum_of_charts(
  inputs: Array,
  params: ManifoldParams,
  shares: Array | None,
  activation: Activation,
  matmul: Matmul,
) -> Array:
  """Σ_q w_q U_q in float32, or the mean, one chart at a time."""
  count, width = params.biases.shape
  hidden, maps = None, params.charts
  # One axis of tokens: the gradient of a product over two is much slower.
  tokens = inputs.reshape(-1, inputs.shape[-1])
  if params.factors is not None:
    hidden = jnp.split(_side_by_side(tokens, maps, matmul), count, axis=-1)
    hidden, maps = jnp.stack(hidden), params.factors
  columns = None if shares is None else shares.reshape(-1, count).T

  # The gradient makes a chart anew: cheaper than to read it from memory.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def chart(inputs: Array, weights: Array, bias: Array, share: Array | None):
    values = activation(_plus(matmul(inputs, weights), bias))
    values = values.astype(jnp.float32)
    return values if share is None else share[..., None] * values

  def add(total: Array, of_chart: tuple) -> tuple[Array, None]:
    own, *rest = of_chart
    return total + chart(tokens if own is None else own, *rest), None

  zero = jnp.zeros((len(tokens), width), jnp.float32)
  total, _ = jax.lax.scan(add, zero, (hidden, maps, params.biases, columns))
  total = total.reshape(*inputs.shape[:-1], width)
  return total / count if shares is None else total


def _check(inputs: Array, params: ManifoldParams, variant: str) -> None:
  if variant not in get_args(Variant):
    raise ValueError(f'{variant=} must be one of {get_args(Variant)}')
  if params.charts.ndim != 3:
    raise ValueError(f'charts must be (q, d, width): {params.charts.shape}')
  given = {k: v.shape for k, v in params._asdict().items() if v is not None}
  needed = set(_NEEDS.get(variant, '').split())
  allowed = needed | {'output' if variant == 'vanilla' else 'factors'}
  optional = set(given) - {'scales', 'charts', 'biases'}
  if not needed <= optional <= allowed:
    raise ValueError(
      f'{variant=} needs {sorted(needed)} and takes no more than '
      f'{sorted(allowed)}: {sorted(optional)} are given'
    )
  count, _, rank = given['charts']
  *_, width = given.get('factors') or given['charts']
  features = inputs.shape[-1]
  fitting = {
    'scales': (count, features),
    'charts': (count, features, rank),
    'biases': (count, width),
    'factors': (count, rank, width),
    'output': (count * width, *given.get('output', ())[-1:]),
    'membership': (features, count),
    'kernel': (3, 3, count),
  }
  for name, shape in given.items():
    if shape != fitting[name]:
      raise ValueError(f'{name} must be {fitting[name]}: {shape} {features=}')


def _check_grid(
  tokens: int, variant: str, grid: tuple[int, int] | None, prefix: int
) -> None:
  if (grid is not None) != (variant == 'spatial') or (grid is None and prefix):
    raise ValueError(
      "variant='spatial' needs a grid, the others take neither grid nor "
      f'prefix: {variant=} {grid=} {prefix=}'
    )
  if grid is not None and (
    min(*grid, prefix + 1) < 1 or prefix + grid[0] * grid[1] != tokens
  ):
    raise ValueError(f'{prefix=} and {grid=} do not make {tokens=}')
