"""Tests of `msba_jax.data.plan`."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.data import plan
from msba_jax.data.errors import InputError

FIRST = [10, 11, 9, 0, 1, 3]
SECOND = [16, 18, 17, 15, 12, 13]
KEY = [2534701093, 3589313961]


def planned(labels, step, *, seed=0, classes=2, images=3):
  index = plan.class_index(np.asarray(labels))
  return plan.plan_batch(
    index, seed=seed, step=step, classes=classes, images=images
  )


@hypothesis.given(
  counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
  images=st.integers(1, 6),
  seed=st.integers(-(2**63), 2**64),
  step=st.integers(0, 2**40),
  data=st.data(),
)
def test_a_batch_has_p_classes_and_k_images(counts, images, seed, step, data):
  rng = np.random.default_rng(0)
  labels = rng.permutation(np.repeat(np.arange(len(counts)) * 2, counts))
  classes = data.draw(st.integers(1, len(counts)))
  indices, key = planned(
    labels, step, seed=seed, classes=classes, images=images
  )
  assert indices.dtype == np.int64
  grouped = labels[indices].reshape(classes, images)
  assert (grouped == grouped[:, :1]).all()
  assert len(set(grouped[:, 0])) == classes
  for row, own in zip(indices.reshape(classes, images), grouped, strict=True):
    count = (labels == own[0]).sum()
    repeats = np.unique(row, return_counts=True)[1]
    assert len(repeats) == min(count, images)
    assert repeats.max() - repeats.min() <= 1
  assert key.dtype == np.uint32
  assert key.shape == (2,)


def test_the_plan_is_a_pure_function_of_seed_and_step():
  labels = np.repeat(np.arange(6), 7)
  one, same = planned(labels, 5), planned(labels, 5)
  np.testing.assert_array_equal(one.indices, same.indices)
  np.testing.assert_array_equal(one.key, same.key)
  for other in (planned(labels, 6), planned(labels, 5, seed=1)):
    assert (one.indices != other.indices).any()
    assert (one.key != other.key).any()


def test_the_plan_stays_what_it_is():
  """Resumed runs rely on it: a change here is a break."""
  first, second = (planned(np.repeat(np.arange(5), 4), s) for s in (0, 1))
  assert first.indices.tolist() == FIRST
  assert second.indices.tolist() == SECOND
  assert first.key.tolist() == KEY


def test_keys_are_keys():
  keys = [planned([0, 1, 2], step, images=1).key for step in range(50)]
  assert len({tuple(key) for key in keys}) == 50
  jax.random.uniform(jax.random.wrap_key_data(keys[0], impl='threefry2x32'))


def test_every_image_comes_equally_often_when_sizes_fit():
  labels = np.repeat(np.arange(8), 12)
  seen = np.zeros(len(labels), int)
  for step in range(2 * 4 * 4):  # 4 steps a cycle, 4 cycles a pass
    np.add.at(seen, planned(labels, step).indices, 1)
  np.testing.assert_array_equal(seen, 2)


def test_every_image_comes_when_sizes_do_not_fit(rng):
  counts = rng.integers(1, 30, 21)
  labels = np.repeat(np.arange(21), counts)
  seen = np.zeros(len(labels), int)
  classes = np.zeros(21, int)
  index = plan.class_index(labels)
  for step in range(600):
    batch = plan.plan_batch(index, seed=0, step=step, classes=4, images=4)
    np.add.at(seen, batch.indices, 1)
    np.add.at(classes, labels[batch.indices], 1)
  assert seen.min() > 0
  assert classes.min() > 0.9 * classes.mean()
  mean = classes / counts
  assert (np.abs(seen - mean[labels]) < 0.35 * mean[labels] + 3).all()


def test_classes_meet_all_others():
  labels = np.arange(12)
  met = np.zeros((12, 12), int)
  for step in range(400):
    chosen = planned(labels, step, classes=3, images=1).indices
    met[np.ix_(chosen, chosen)] += 1
  others = met[~np.eye(12, dtype=bool)]
  assert others.min() > 0.4 * others.mean()


def test_labels_without_images_are_passed_over():
  index = plan.class_index(np.array([7, 3, 7]))
  assert index.order.tolist() == [1, 0, 2]
  assert index.starts.tolist() == [0, 1]
  assert index.counts.tolist() == [1, 2]


def test_impossible_plans_are_refused():
  with pytest.raises(InputError, match=r'classes_per_batch=4 .* the 3'):
    planned([0, 1, 2], 0, classes=4)
  for wrong in ({'classes': 0}, {'images': 0}):
    with pytest.raises(ValueError, match='must be positive'):
      planned([0, 1], 0, **wrong)
  with pytest.raises(ValueError, match='step=-1'):
    planned([0, 1], -1)
