"""Which tensors of a published checkpoint become which of our parameters.

A table of names is an iterable of `Tensor`. Sources are named and laid out as
in PyTorch's state dict of the model, parameters as Linen lays them out.

Attributes:
  Tensor: one of our parameters and where it comes from.
  dense_tensors: kernel and bias of a linear layer, or of several as one.
  norm_tensors: scale and bias of a normalisation.
  conv_tensors: kernel and bias of a two-dimensional convolution.
  identity: a tensor that both lay out alike.
  dense_kernel: the weight of a linear layer, or of several as one.
  dense_bias: the bias of a linear layer, or of several as one.
  conv_kernel: the weight of a two-dimensional convolution.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

__all__ = [
  'Tensor',
  'conv_kernel',
  'conv_tensors',
  'dense_bias',
  'dense_kernel',
  'dense_tensors',
  'identity',
  'norm_tensors',
]


class Tensor(NamedTuple):
  """One of our parameters and where it comes from.

  Attributes:
    sources: names of the tensors it is made of; none where the checkpoint has
      nothing for it and `convert` gives the initial value.
    path: names that lead to ours; the first is the collection, such as
      'params' or 'batch_stats'.
    convert: takes one array a source, in their order, and gives ours.
  """

  sources: tuple[str, ...]
  path: tuple[str, ...]
  convert: Callable[..., np.ndarray]


def dense_tensors(
  sources: tuple[str, ...], path: tuple[str, ...], *, bias: bool = True
) -> Iterator[Tensor]:
  """Linear layers of these names, side by side as one of ours.

  Args:
    sources: names of the layers, without '.weight' and '.bias'.
    path: names that lead to our layer, without the collection.
    bias: whether they have biases.

  Yields:
    One entry a parameter.
  """
  weights = tuple(f'{source}.weight' for source in sources)
  yield Tensor(weights, ('params', *path, 'kernel'), dense_kernel)
  if bias:
    biases = tuple(f'{source}.bias' for source in sources)
    yield Tensor(biases, ('params', *path, 'bias'), dense_bias)


def norm_tensors(source: str, path: tuple[str, ...]) -> Iterator[Tensor]:
  """Scale and bias of a normalisation; arguments as `dense_tensors`."""
  yield Tensor((f'{source}.weight',), ('params', *path, 'scale'), identity)
  yield Tensor((f'{source}.bias',), ('params', *path, 'bias'), identity)


def conv_tensors(
  source: str, path: tuple[str, ...], *, bias: bool = True
) -> Iterator[Tensor]:
  """Kernel and bias of a convolution; arguments as `dense_tensors`."""
  yield Tensor((f'{source}.weight',), ('params', *path, 'kernel'), conv_kernel)
  if bias:
    yield Tensor((f'{source}.bias',), ('params', *path, 'bias'), identity)


def identity(source: np.ndarray) -> np.ndarray:
  """The same array."""
  return source


def dense_kernel(*sources: np.ndarray) -> np.ndarray:
  """Each (features, d) transposed, then side by side: (d, Σ features)."""
  return np.concatenate([source.T for source in sources], axis=1)


def dense_bias(*sources: np.ndarray) -> np.ndarray:
  """Vectors end to end: (Σ features,)."""
  return np.concatenate(sources)


def conv_kernel(source: np.ndarray) -> np.ndarray:
  """(out, in, y, x) to (y, x, in, out)."""
  return np.transpose(source, (2, 3, 1, 0))
