"""Losses against pytorch-metric-learning and torch, values and gradients.

Torch computes in float64, we in float32; both start from the same float32
numbers. Every case names the reduction that is compared.
"""

import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax import losses

with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  torch = pytest.importorskip('torch')
  pml = pytest.importorskip('pytorch_metric_learning')
  from pytorch_metric_learning import losses as theirs
  from pytorch_metric_learning import miners, reducers

pytestmark = pytest.mark.filterwarnings('ignore')
N, E, C = 24, 8, 6
MARGIN = 0.5


class Case(NamedTuple):
  ours: Any
  reduction: Any
  theirs: Any


def without_proxies(loss):
  return lambda x, y, w: loss(x, y)


def batch_hard(**options):
  """Mean over the triplets of PML's batch-hard miner, one per anchor."""
  miner = miners.BatchHardMiner()
  loss = theirs.TripletMarginLoss(reducer=reducers.MeanReducer(), **options)
  return lambda x, y, w: loss(x, y, miner(x, y))


def with_proxies(loss, name, transposed):
  """A loss of PML that owns its proxies, with ours put in."""

  def function(x, y, w):
    del loss._parameters[name]
    setattr(loss, name, w.T if transposed else w)
    loss.cast_types = lambda *_: None  # it would cut the gradient
    try:
      return loss(x, y)
    finally:
      delattr(loss, name)
      loss.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))

  return function


def arcface_of(degrees):
  return with_proxies(
    theirs.ArcFaceLoss(C, E, margin=degrees, scale=64), 'W', True
  )


CASES = {
  # SupConLoss with AvgNonZeroReducer: mean over anchors with a positive.
  'supervised contrastive': Case(
    losses.supervised_contrastive,
    losses.mean_over_anchors,
    without_proxies(theirs.SupConLoss(temperature=0.1)),
  ),
  # NTXentLoss with MeanReducer: mean over ordered positive pairs.
  'nt-xent': Case(
    partial(losses.nt_xent, temperature=0.07),
    losses.mean_over_positive_pairs,
    without_proxies(theirs.NTXentLoss(temperature=0.07)),
  ),
  # MultiSimilarityLoss with MeanReducer: mean over images; every image has a
  # positive here, since without one PML keeps the negative term and we do not.
  'multi-similarity': Case(
    losses.multi_similarity,
    losses.mean_over_images,
    without_proxies(theirs.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)),
  ),
  # MeanReducer over mined triplets: mean over anchors that have both.
  'batch-hard triplet': Case(
    losses.batch_hard_triplet, losses.mean_over_anchors, batch_hard(margin=0.2)
  ),
  'batch-hard soft triplet': Case(
    partial(losses.batch_hard_triplet, margin=None),
    losses.mean_over_anchors,
    batch_hard(margin=0, smooth_loss=True),
  ),
  # DivisorReducer: pulls over proxies with an image, pushes over all proxies.
  'proxy-anchor': Case(
    losses.proxy_anchor,
    losses.mean_over_proxies,
    with_proxies(
      theirs.ProxyAnchorLoss(C, E, margin=0.1, alpha=32), 'proxies', False
    ),
  ),
  # ArcFaceLoss with MeanReducer: mean over images.
  'arcface': Case(
    partial(losses.arcface, margin=MARGIN),
    losses.mean_over_images,
    arcface_of(np.degrees(MARGIN)),
  ),
  # So wide a margin that many images lie beyond π.
  'arcface beyond π': Case(
    partial(losses.arcface, margin=1.5),
    losses.mean_over_images,
    arcface_of(np.degrees(1.5)),
  ),
  # NormalizedSoftmaxLoss with MeanReducer: mean over images.
  'normalised softmax': Case(
    losses.normalized_softmax,
    losses.mean_over_images,
    with_proxies(
      theirs.NormalizedSoftmaxLoss(C, E, temperature=0.05), 'W', True
    ),
  ),
  # torch.nn.functional.cross_entropy, reduction='mean': over images.
  'label-smoothed cross-entropy': Case(
    lambda x, y, **options: losses.label_smoothed_cross_entropy(
      x, y, smoothing=0.1, **options
    ),
    losses.mean_over_images,
    lambda x, y, w: torch.nn.functional.cross_entropy(
      x, y, label_smoothing=0.1
    ),
  ),
}
OVER_PROXIES = {'proxy-anchor', 'arcface', 'arcface beyond π'} | {
  'normalised softmax'
}


def inputs(seed, singletons):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(N, E)).astype(np.float32)
  w = rng.normal(size=(C, E)).astype(np.float32)
  y = np.repeat(np.arange(C - 1, dtype=np.int32), N // (C - 1) + 1)[:N]
  if singletons:
    y[0] = C - 1
  return x, rng.permutation(y), w


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients_equal_torch(name, seed):
  ours, reduction, reference = CASES[name]
  x, y, w = inputs(seed, singletons=name != 'multi-similarity' and seed > 0)
  labels, valid = jnp.asarray(y), jnp.ones(N, bool)

  def objective(x, w):
    arguments = (x, labels, w) if name in OVER_PROXIES else (x, labels)
    return reduction(ours(*arguments, valid=valid), labels, valid)

  value, gradients = jax.jit(jax.value_and_grad(objective, (0, 1)))(x, w)
  leaves = [
    torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, w)
  ]
  expected = reference(leaves[0], torch.tensor(y, dtype=torch.int64), leaves[1])
  expected.backward()
  np.testing.assert_allclose(value, expected.item(), rtol=1e-5, atol=1e-5)
  for gradient, leaf in zip(gradients, leaves, strict=True):
    other = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
    np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_padding_gives_what_torch_gives_without_it(name):
  ours, reduction, reference = CASES[name]
  x, y, w = inputs(0, singletons=False)
  leaves = [torch.tensor(a, dtype=torch.float64) for a in (x, w)]
  expected = reference(leaves[0], torch.tensor(y, dtype=torch.int64), leaves[1])
  x, y = np.concatenate([x, x[:3]]), np.concatenate([y, y[:3]])
  valid = jnp.arange(N + 3) < N

  @jax.jit
  def objective(x, y, w):
    arguments = (x, y, w) if name in OVER_PROXIES else (x, y)
    return reduction(ours(*arguments, valid=valid), y, valid)

  np.testing.assert_allclose(
    objective(x, y, w), expected.item(), rtol=1e-5, atol=1e-5
  )
