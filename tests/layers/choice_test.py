"""Tests of `msba_jax.layers.choice`."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from msba_jax.layers.choice import (
  neighbouring_mixture,
  straight_through,
  switch_by_image,
)


def mixed(logits, **options):
  """Compiled, which is quicker here than one operation after the other."""
  return jax.jit(functools.partial(neighbouring_mixture, **options))(logits)


def draw(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def mixture(logits, temperature=1.0):
  """One row in float64."""
  p = np.exp(np.asarray(logits, np.float64) / temperature)
  best = int(np.argmax(p))
  beside = [i for i in (best - 1, best + 1) if 0 <= i < len(p)]
  kept = [best, *sorted(beside, key=lambda i: -p[i])[:1]]
  weights = np.zeros(len(p))
  weights[kept] = p[kept] / p[kept].sum()
  return weights


@hypothesis.given(
  n=st.integers(1, 4), k=st.integers(1, 6), seed=st.integers(0, 99),
  temperature=st.sampled_from([0.3, 1.0, 4.0]),
)  # fmt: skip
def test_mixture_equals_the_reference(n, k, seed, temperature):
  logits = draw(np.random.default_rng(seed), n, k)
  weights = mixed(logits, temperature=temperature)
  expected = np.stack([mixture(row, temperature) for row in logits])
  np.testing.assert_allclose(weights, expected, atol=1e-6)


@hypothesis.given(k=st.integers(1, 6), seed=st.integers(0, 99))
def test_two_neighbours_share_the_weight_with_noise_too(k, seed):
  logits = draw(np.random.default_rng(seed), 2, 7, k)
  weights = np.asarray(mixed(logits, key=jax.random.key(seed)))
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
  for row in weights.reshape(-1, k):
    kept = np.flatnonzero(row)
    assert len(kept) <= 2
    assert kept[-1] - kept[0] <= 1


def test_noise_draws_candidates_as_often_as_their_softmax_says(rng):
  logits = jnp.log(jnp.array([0.2, 0.5, 0.3]))
  rows = jnp.broadcast_to(logits, (4000, 3))
  weights = neighbouring_mixture(rows, key=jax.random.key(0))
  shares = np.bincount(np.argmax(weights, axis=-1), minlength=3) / 4000
  np.testing.assert_allclose(shares, [0.2, 0.5, 0.3], atol=0.03)
  again = neighbouring_mixture(rows, key=jax.random.key(0))
  np.testing.assert_array_equal(weights, again)


def test_a_low_temperature_chooses_and_extremes_stay_finite():
  logits = jnp.array([[0.0, 0.1, 0.0], [1e30, -1e30, 0.0], [-np.inf, 2.0, 1.0]])
  weights = neighbouring_mixture(logits, temperature=1e-3)
  np.testing.assert_allclose(
    weights, [[0, 1, 0], [1, 0, 0], [0, 1, 0]], atol=1e-6
  )


def test_gradients_reach_the_two_and_nobody_else(variant, rng):
  logits = jnp.array([[0.5, 2.0, 1.0, 1.9]])
  factors = draw(rng, 1, 4)
  gradient = variant(
    jax.grad(lambda x: jnp.sum(factors * neighbouring_mixture(x)))
  )(logits)
  np.testing.assert_array_equal(np.asarray(gradient) != 0, [[0, 1, 1, 0]])
  check_grads(
    jax.jit(lambda x: neighbouring_mixture(x, temperature=0.7)), (logits,), 1
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_dtype_of_the_logits_comes_back(rng, dtype):
  logits = draw(rng, 2, 3).astype(dtype)
  weights = neighbouring_mixture(logits, key=jax.random.key(1))
  assert weights.dtype == dtype


@pytest.mark.usefixtures('unchecked')
def test_errors_of_the_mixture():
  with pytest.raises(ValueError, match=r'temperature=0.0 must be positive'):
    neighbouring_mixture(jnp.zeros((2, 3)), temperature=0.0)
  with pytest.raises(ValueError, match='no candidates on its last axis'):
    neighbouring_mixture(jnp.zeros((2, 0)))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_straight_through_is_hard_forward_and_soft_backward(rng, dtype):
  scores = draw(rng, 3, 4).astype(dtype)

  def choose(scores):
    soft = jax.nn.sigmoid(scores)
    return straight_through(soft > 0.5, soft), soft

  hard, soft = choose(scores)
  assert hard.dtype == dtype
  np.testing.assert_array_equal(
    hard.astype(jnp.float32), np.asarray(soft) > 0.5
  )
  change = draw(rng, 3, 4).astype(dtype)
  _, pull = jax.vjp(choose, scores)
  ours = pull((change, jnp.zeros_like(change)))
  theirs = pull((jnp.zeros_like(change), change))
  chex.assert_trees_all_equal(ours, theirs)
  assert np.all(np.asarray(ours[0]) != 0)


def test_what_is_hard_gets_no_gradient(rng):
  hard, soft = draw(rng, 3), draw(rng, 3)
  gradients = jax.grad(lambda *x: jnp.sum(straight_through(*x) ** 2), (0, 1))(
    hard, soft
  )
  np.testing.assert_array_equal(gradients[0], jnp.zeros(3))
  np.testing.assert_allclose(gradients[1], 2 * hard, rtol=1e-5)


def branches_of(rng, count, d=3):
  """Functions of trees that mix features, but no images."""
  weights = draw(rng, count, d, d)

  def branch(i, tree):
    mixed = jnp.tanh(tree['x'] @ weights[i]) * (i + 1)
    return mixed, jnp.sum(tree['y'], axis=(1, 2)) - i

  return [functools.partial(branch, i) for i in range(count)]


def image_by_image(choice, branches, operands):
  """Every image alone, outside of any loop."""
  made = [
    branches[int(i)](jax.tree.map(lambda x, n=n: x[n : n + 1], operands))
    for n, i in enumerate(choice)
  ]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *made)


@hypothesis.settings(max_examples=8)
@hypothesis.given(
  n=st.integers(1, 9), count=st.integers(1, 4), group=st.integers(1, 5),
  seed=st.integers(0, 99),
)  # fmt: skip
def test_every_image_goes_through_its_branch(n, count, group, seed):
  rng = np.random.default_rng(seed)
  branches = branches_of(rng, count)
  operands = {'x': draw(rng, n, 3), 'y': draw(rng, n, 2, 2)}
  choice = jnp.asarray(rng.integers(0, count, n))
  found = jax.jit(
    lambda *given: switch_by_image(given[0], branches, given[1], group=group)
  )(choice, operands)
  expected = image_by_image(choice, branches, operands)
  chex.assert_trees_all_close(found, expected, atol=1e-6)


def test_one_compilation_serves_all_choices(rng):
  branches = branches_of(rng, 3)
  operands = {'x': draw(rng, 7, 3), 'y': draw(rng, 7, 2, 2)}
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def switch(choice, operands):
    return switch_by_image(choice, branches, operands, group=2)

  for choice in (
    [0] * 7,
    [2] * 7,
    [0, 1, 2, 0, 1, 2, 0],
    [2, 2, 1, 1, 1, 0, 0],
  ):
    chex.assert_trees_all_close(
      switch(jnp.array(choice), operands),
      image_by_image(choice, branches, operands),
      atol=1e-6,
    )


def test_batch_mates_do_not_matter(rng):
  branches = branches_of(rng, 3)
  operands = {'x': draw(rng, 8, 3), 'y': draw(rng, 8, 2, 2)}
  choice = jnp.asarray(rng.integers(0, 3, 8))
  whole = switch_by_image(choice, branches, operands, group=3)
  for images in ([5], [4, 1], [7, 0, 2, 3, 6], list(range(7, -1, -1))):
    places = np.array(images)
    found = switch_by_image(
      choice[places],
      branches,
      jax.tree.map(lambda x, at=places: x[at], operands),
      group=3,
    )
    chex.assert_trees_all_close(
      found, jax.tree.map(lambda x, at=places: x[at], whole), atol=1e-6
    )


def test_other_images_may_be_anything(rng):
  branches = branches_of(rng, 2)
  operands = {'x': draw(rng, 5, 3), 'y': draw(rng, 5, 2, 2)}
  choice = jnp.array([0, 1, 0, 1, 0])
  broken = jax.tree.map(lambda x: x.at[1:4].set(jnp.nan), operands)
  for found, clean in zip(
    switch_by_image(choice, branches, broken, group=2),
    switch_by_image(choice, branches, operands, group=2),
    strict=True,
  ):
    np.testing.assert_array_equal(found[0], clean[0])
    np.testing.assert_array_equal(found[4], clean[4])


@pytest.mark.parametrize(
  ('choice', 'rounds'),
  [
    ([1] * 7, [0, 3, 0]),
    ([0, 0, 0, 1, 1, 1, 1], [1, 2, 0]),
    ([2, 0, 2, 0, 2, 0, 2], [1, 0, 2]),
    ([0, 1, 2, 2, 2, 2, 2], [1, 1, 2]),
  ],
)
def test_only_what_is_chosen_is_computed(rng, choice, rounds):
  runs = []

  def branch(i, x):
    jax.debug.callback(lambda size: runs.append((i, int(size))), len(x))
    return x * (i + 1)

  branches = [functools.partial(branch, i) for i in range(3)]
  numbers = draw(rng, 7)
  switch = jax.jit(lambda c, x: switch_by_image(c, branches, x, group=3))
  found = switch(jnp.array(choice), numbers)
  jax.effects_barrier()
  np.testing.assert_allclose(found, numbers * (1 + np.array(choice)))
  assert [sum(i == j for j, _ in runs) for i in range(3)] == rounds
  assert {size for _, size in runs} == {3}


def test_choices_out_of_range_are_the_nearest(rng):
  branches = [lambda x: -x, lambda x: 2 * x]
  numbers = draw(rng, 3)
  found = switch_by_image(jnp.array([-4, 9, 1]), branches, numbers, group=2)
  expected = np.asarray(numbers) * np.array([-1, 2, 2])
  np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize('count', [1, 5])
def test_the_gradient_is_that_of_the_branch_of_each_image(rng, count):
  branches = [lambda x: {'found': jnp.sin(x)}, lambda x: {'found': jnp.cos(x)}]
  choice = np.array([1, 0, 0, 1, 1])[:count]

  @jax.jit
  @jax.grad
  def gradient(x, choice):
    return jnp.sum(switch_by_image(choice, branches, x, group=2)['found'])

  numbers = draw(rng, count)
  expected = np.where(choice, -np.sin(numbers), np.cos(numbers))
  np.testing.assert_allclose(
    gradient(numbers, jnp.asarray(choice)), expected, rtol=1e-6
  )


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.int32])
def test_dtypes_are_those_of_the_branches(rng, dtype):
  numbers = jnp.asarray(rng.integers(0, 9, 5), dtype)
  found = switch_by_image(
    jnp.array([0, 1, 0, 1, 1]), [lambda x: x, lambda x: -x], numbers, group=2
  )
  assert found.dtype == dtype
  np.testing.assert_array_equal(
    found.astype(jnp.float32),
    numbers.astype(jnp.float32) * np.array([1, -1, 1, -1, -1]),
  )


@pytest.mark.usefixtures('unchecked')
def test_errors_of_the_switch():
  choice, x = jnp.array([0, 1]), jnp.zeros((2, 3))
  with pytest.raises(ValueError, match='branches must not be empty'):
    switch_by_image(choice, [], x)
  with pytest.raises(ValueError, match='group=0 must be at least 1'):
    switch_by_image(choice, [jnp.sin], x, group=0)
  with pytest.raises(ValueError, match=r'needs 2 images .*\[\(3, 3\)\]'):
    switch_by_image(choice, [jnp.sin], jnp.zeros((3, 3)))
  with pytest.raises(ValueError, match='an integer for each image'):
    switch_by_image(choice.astype(jnp.float32), [jnp.sin], x)
  with pytest.raises(ValueError, match='results of different shapes'):
    switch_by_image(choice, [jnp.sin, lambda x: x[:, :1]], x)
  with pytest.raises(ValueError, match='give 2 results for 2 images'):
    switch_by_image(choice, [lambda x: x[:1]], x)
