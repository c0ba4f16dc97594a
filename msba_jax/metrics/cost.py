r"""What a transformer block costs, and what sparse attention can save of it.

A multiply and an add are two FLOPs. Of a block of width C with an MLP of ratio
e, every one of N tokens costs 4C² multiply-adds for its query, key, value and
output, 2eC² for the MLP, and 2NC for its products with all keys and values.
Only the last part gets smaller when attention becomes sparse. Norms, biases and
the softmax are left out.

Attributes:
  attention_share: the part of a block that sparse attention can save.
  block_flops: FLOPs of a block.
  CompiledCost: what XLA says of a compiled program.
  compiled_cost: compiles a function to ask for it.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

__all__ = ['CompiledCost', 'attention_share', 'block_flops', 'compiled_cost']


def attention_share(
  tokens: int, features: int, *, ratio: float | int = 4.0
) -> float:
  r"""Share of the attention products in a block: N / (N + (2 + e) C).

  It is 2NC over 4C² + 2eC² + 2NC, with an MLP of ratio 4 N / (N + 6C), and the
  ceiling of what sparse attention saves.

  Args:
    tokens: N, tokens that attend to each other.
    features: C, width of a token.
    ratio: e, width of the MLP over C.

  Returns:
    Between zero and one.

  Raises:
    ValueError: there are no tokens or no features, or the ratio is negative.

  Example:
    >>> round(attention_share(56 * 56, 64), 2)
    0.89
  """
  _check(tokens, features, ratio)
  return tokens / (tokens + (2 + ratio) * features)


def block_flops(
  tokens: int,
  features: int,
  *,
  kept: float | int = 1.0,
  ratio: float | int = 4.0,
) -> float:
  r"""FLOPs of a block for all its tokens: 2 N [(4 + 2e) C² + 2 kept N C].

  Args:
    tokens: N, tokens that attend to each other.
    features: C, width of a token.
    kept: share of the pairs of tokens that are computed, not only unmasked.
    ratio: e, width of the MLP over C.

  Returns:
    FLOPs of the forward pass of one block.

  Raises:
    ValueError: there are no tokens or no features, the ratio is negative, or
      `kept` is not a share.

  Example:
    >>> dense, sparse = (block_flops(3136, 64, kept=x) for x in (1.0, 0.25))
    >>> round(1 - sparse / dense, 2)
    0.67
  """
  _check(tokens, features, ratio)
  if not 0 <= kept <= 1:
    raise ValueError(f'{kept=} must be between 0 and 1')
  dense = (4 + 2 * ratio) * features**2
  return 2 * tokens * (dense + 2 * kept * tokens * features)


class CompiledCost(NamedTuple):
  """What XLA says of a compiled program.

  Attributes:
    flops: floating-point operations. The body of a loop counts once, however
      often it runs, and calls of foreign kernels count nothing, so that this is
      a lower bound unless `loops` is zero.
    temporary_bytes: the most that arrays take which are neither arguments nor
      results.
    loops: how many loops the program has.
  """

  flops: float
  temporary_bytes: int
  loops: int


def compiled_cost(
  function: Callable[..., Any], *arguments: Any
) -> CompiledCost:
  """Compiles a function for its arguments and asks XLA what it costs.

  Nothing is run. Attention in chunks and over chosen blocks loops: compare it
  with `block_flops`, not by `flops`.

  Args:
    function: of arrays.
    *arguments: arrays, trees of them, or `jax.ShapeDtypeStruct`.

  Returns:
    `CompiledCost(flops, temporary_bytes, loops)` for the default device.

  Raises:
    NotImplementedError: XLA tells nothing for this device.

  Example:
    >>> matrix = jax.ShapeDtypeStruct((8, 8), 'float32')
    >>> compiled_cost(lambda x: x @ x, matrix).flops
    1024.0
  """
  compiled = jax.jit(function).lower(*arguments).compile()
  costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
  if costs is None or memory is None:
    raise NotImplementedError(
      f'{jax.default_backend()} does not tell what a program costs'
    )
  return CompiledCost(
    flops=float(costs.get('flops', 0.0)),
    temporary_bytes=memory.temp_size_in_bytes,
    loops=len(re.findall(r'\bwhile\(', compiled.as_text() or '')),
  )


def _check(tokens: int, features: int, ratio: float | int) -> None:
  if tokens < 1 or features < 1:
    raise ValueError(f'{tokens=} and {features=} must be at least 1')
  if not ratio >= 0:
    raise ValueError(f'{ratio=} must not be negative')
