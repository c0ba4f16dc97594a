"""Every loss beside a float64 NumPy reference that is a loop over images."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from msba_jax import losses


class Case(NamedTuple):
  """A loss and its reference, both `(embeddings, labels, proxies, valid)`.

  `axis` says what the loss is unreduced over: 'images', 'pairs' of images,
  'proxies', or a 'table' of images by something else.
  """

  axis: str
  loss: Callable
  reference: Callable


def unit(x):
  return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-12)


def log_one_plus_sum_exp(scores):
  return np.log1p(np.sum(np.exp(scores))) if len(scores) else 0.0


def pairs_of(x, y, valid):
  """Cosines, and of every valid image its positives and its negatives."""
  kept = np.flatnonzero(valid)
  positives = {i: [p for p in kept if p != i and y[p] == y[i]] for i in kept}
  negatives = {i: [a for a in kept if y[a] != y[i]] for i in kept}
  return unit(x) @ unit(x).T, positives, negatives


def supervised_contrastive(x, y, _, valid, temperature=0.1):
  s, positives, negatives = pairs_of(x, y, valid)
  out = np.zeros(len(x))
  for i, others in positives.items():
    if others:
      compared = np.exp(s[i, others + negatives[i]] / temperature)
      out[i] = np.mean(np.log(compared.sum()) - s[i, others] / temperature)
  return out


def nt_xent(x, y, _, valid, temperature=0.1):
  s, positives, negatives = pairs_of(x, y, valid)
  out = np.zeros((len(x), len(x)))
  for i, others in positives.items():
    for p in others:
      rivals = np.exp(s[i, negatives[i]] / temperature).sum()
      own = np.exp(s[i, p] / temperature)
      out[i, p] = np.log1p(rivals / own)
  return out


def multi_similarity(x, y, _, valid, alpha=2, beta=50, base=0.5):
  s, positives, negatives = pairs_of(x, y, valid)
  out = np.zeros(len(x))
  for i, others in positives.items():
    if others:
      out[i] = (
        log_one_plus_sum_exp(-alpha * (s[i, others] - base)) / alpha
        + log_one_plus_sum_exp(beta * (s[i, negatives[i]] - base)) / beta
      )
  return out


def triplet(x, y, _, valid, margin=0.2):
  _, positives, negatives = pairs_of(x, y, valid)
  distance = np.linalg.norm(unit(x)[:, None] - unit(x)[None], axis=-1)
  out = np.zeros(len(x))
  for i in positives:
    if positives[i] and negatives[i]:
      far = distance[i, positives[i]].max() - distance[i, negatives[i]].min()
      out[i] = np.log1p(np.exp(far)) if margin is None else far + margin
  return np.maximum(out, 0)


def sigmoid_table(x, y, w, valid):
  same = y[:, None] == np.arange(len(w))[None]
  logits = 10 * unit(x) @ unit(w).T - 10
  losses_ = np.log1p(np.exp(np.where(same, -logits, logits)))
  return losses_ * valid[:, None]


def sigmoid_pairs(x, y, _, valid):
  logits = 10 * unit(x) @ unit(x).T - 10
  same = y[:, None] == y[None]
  losses_ = np.log1p(np.exp(np.where(same, -logits, logits)))
  asked = valid[:, None] & valid[None] & ~np.eye(len(x), dtype=bool)
  return losses_ * asked


def proxy_anchor(x, y, w, valid, alpha=32, delta=0.1):
  s = unit(x) @ unit(w).T
  present = len({label for label in y[valid] if 0 <= label < len(w)})
  out = np.zeros(len(w))
  for c in range(len(w)):
    own, foreign = s[valid & (y == c), c], s[valid & (y != c), c]
    if len(own):
      pull = log_one_plus_sum_exp(-alpha * (own - delta))
      out[c] += pull * len(w) / present
    out[c] += log_one_plus_sum_exp(alpha * (foreign + delta))
  return out


def cross_entropy(z, y, _, valid, smoothing=0.1):
  out = np.zeros(len(z))
  for i in np.flatnonzero(valid):
    if 0 <= y[i] < z.shape[1]:
      logs = z[i] - z[i].max()
      logs = logs - np.log(np.exp(logs).sum())
      out[i] = -(1 - smoothing) * logs[y[i]] - smoothing * logs.mean()
  return out


def normalized_softmax(x, y, w, valid, temperature=0.05, smoothing=0.0):
  logits = unit(x) @ unit(w).T / temperature
  return cross_entropy(logits, y, w, valid, smoothing)


def arcface(x, y, w, valid, margin=0.5, scale=64):
  cosines = unit(x) @ unit(w).T
  for i, label in enumerate(y):
    if 0 <= label < len(w):
      angle = np.arccos(np.clip(cosines[i, label], -1, 1))
      cosines[i, label] = (
        np.cos(angle + margin)
        if angle + margin <= np.pi
        else np.cos(angle) - margin * np.sin(margin)
      )
  return cross_entropy(scale * cosines, y, w, valid, 0)


def context_of(y, e, module):
  """What the context made of every image: fixed, and of its own class."""
  return module.cos(y[:, None] * 1.0 + module.arange(e)[None] * 0.7)


def consistency(x, y, _, valid):
  context = context_of(y, x.shape[1], np)
  return (1 - np.sum(unit(x) * unit(context), -1)) * valid


def of_images(loss, **options):
  return lambda x, y, w, valid: loss(x, y, valid=valid, **options)


def of_proxies(loss, **options):
  return lambda x, y, w, valid: loss(x, y, w, valid=valid, **options)


CASES = {
  'supervised_contrastive': Case(
    'images', of_images(losses.supervised_contrastive), supervised_contrastive
  ),
  'nt_xent': Case('pairs', of_images(losses.nt_xent), nt_xent),
  'multi_similarity': Case(
    'images', of_images(losses.multi_similarity), multi_similarity
  ),
  'triplet': Case('images', of_images(losses.batch_hard_triplet), triplet),
  'soft_triplet': Case(
    'images',
    of_images(losses.batch_hard_triplet, margin=None),
    partial(triplet, margin=None),
  ),
  'sigmoid_pairs': Case(
    'pairs', of_images(losses.pairwise_sigmoid), sigmoid_pairs
  ),
  'sigmoid_table': Case(
    'table',
    lambda x, y, w, valid: losses.pairwise_sigmoid(
      x, y, others=w, other_labels=jnp.arange(len(w)), valid=valid
    ),
    sigmoid_table,
  ),
  'proxy_anchor': Case(
    'proxies', of_proxies(losses.proxy_anchor), proxy_anchor
  ),
  'normalized_softmax': Case(
    'images', of_proxies(losses.normalized_softmax), normalized_softmax
  ),
  'smoothed_softmax': Case(
    'images',
    of_proxies(losses.normalized_softmax, smoothing=0.1),
    partial(normalized_softmax, smoothing=0.1),
  ),
  'arcface': Case('images', of_proxies(losses.arcface), arcface),
  'cross_entropy': Case(
    'images', of_images(losses.label_smoothed_cross_entropy), cross_entropy
  ),
  'consistency': Case(
    'images',
    lambda x, y, w, valid: losses.solo_consistency(
      x, context_of(y, x.shape[1], jnp), valid=valid
    ),
    consistency,
  ),
}


@pytest.fixture(params=CASES)
def case(request):
  """One loss after the other, with its reference."""
  return CASES[request.param]


@pytest.fixture
def cases():
  """All losses by name."""
  return CASES
