"""Tests of `msba_jax.data.source`."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.data import source as source_lib
from msba_jax.data.errors import InputError


class Numbers:
  """A source whose pictures say their index."""

  def __init__(self, labels, names):
    self.labels = np.asarray(labels, np.int32)
    self.class_names = tuple(names)
    self.ids = tuple(f'image-{i}' for i in range(len(labels)))

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    image = np.full((2, 2, 3), index, np.uint8)
    return source_lib.Record(image=image, label=int(self.labels[index]))

  def fingerprint(self):
    return f'{self.labels.tolist()}{self.class_names}'


SOURCE = Numbers([2, 0, 1, 2, 0, 3], ['ant', 'bee', 'cat', 'dog'])


def test_a_subset_keeps_pictures_and_numbers_classes_anew():
  subset = source_lib.SubsetSource(SOURCE, [3, 1, 0])
  assert subset.class_names == ('ant', 'cat')
  assert subset.labels.tolist() == [1, 0, 1]
  assert subset.labels.dtype == np.int32
  assert subset.ids == ('image-3', 'image-1', 'image-0')
  assert [int(subset[i]['image'].max()) for i in range(3)] == [3, 1, 0]
  assert [subset[i]['label'] for i in range(3)] == [1, 0, 1]
  assert isinstance(subset, source_lib.Source)


def test_subsets_share_classes_that_are_named():
  queries = source_lib.SubsetSource(SOURCE, [0], classes=[0, 2])
  gallery = source_lib.SubsetSource(SOURCE, [1, 3], classes=[0, 2])
  assert queries.class_names == gallery.class_names == ('ant', 'cat')
  assert queries.labels.tolist() == [1]
  assert gallery.labels.tolist() == [0, 1]


def test_a_subset_refuses_what_it_cannot_hold():
  with pytest.raises(ValueError, match=r'index 6 is outside .* 6 images'):
    source_lib.SubsetSource(SOURCE, [0, 6])
  with pytest.raises(ValueError, match="class 'dog'"):
    source_lib.SubsetSource(SOURCE, [5], classes=[0, 1])


def test_the_fingerprint_tells_subsets_apart():
  prints = {
    source_lib.SubsetSource(SOURCE, indices).fingerprint()
    for indices in ([0, 1], [1, 0], [0], [0, 1])
  }
  assert len(prints) == 3


def test_a_fingerprint_needs_one_below():
  class Plain(Numbers):
    fingerprint = None

  subset = source_lib.SubsetSource(Plain([0, 1], ['ant', 'bee']), [0])
  with pytest.raises(TypeError, match='Plain has no fingerprint'):
    subset.fingerprint()


@hypothesis.given(
  count=st.integers(2, 9), seed=st.integers(0, 2**40), data=st.data()
)
def test_held_out_classes_share_nothing_with_the_rest(count, seed, data):
  names = [f'class {i}' for i in range(count)]
  labels = data.draw(
    st.lists(st.integers(0, count - 1), max_size=30).map(
      lambda more: [*range(count), *more]
    )
  )
  source = Numbers(labels, names)
  held = data.draw(st.integers(1, count - 1))
  rest, out = source_lib.hold_out_classes(source, held, seed=seed)
  assert len(out.class_names) == held
  assert set(rest.class_names) | set(out.class_names) == set(names)
  assert not set(rest.class_names) & set(out.class_names)
  assert sorted(rest.ids + out.ids) == sorted(source.ids)
  for part in (rest, out):
    for name, label in zip(part.ids, part.labels, strict=True):
      old = source.labels[source.ids.index(name)]
      assert part.class_names[label] == names[old]


@pytest.mark.parametrize('count', [0, 4, -1])
def test_all_or_no_classes_cannot_be_held_out(count):
  with pytest.raises(InputError, match='choose 1 to 3'):
    source_lib.hold_out_classes(SOURCE, count, seed=0)


def test_the_order_depends_on_names_and_seed_alone():
  names = [f'class {i}' for i in range(40)]
  order = source_lib.random_order(names, seed=3)
  assert sorted(order) == list(range(40))
  assert order.tolist() != list(range(40))
  assert source_lib.random_order(names, seed=4).tolist() != order.tolist()
  fewer = source_lib.random_order(names[:39], seed=3)
  assert fewer.tolist() == [i for i in order if i != 39]


def test_images_of_every_class_are_held_out():
  source = Numbers([0, 1] * 5, ('ant', 'bee'))
  rest, held = source_lib.hold_out_images(source, 2, seed=0)
  assert sorted(rest.ids + held.ids) == sorted(source.ids)
  for part, number in ((rest, 3), (held, 2)):
    assert part.class_names == source.class_names
    assert np.bincount(part.labels).tolist() == [number, number]
    for name, label in zip(part.ids, part.labels, strict=True):
      assert source.labels[source.ids.index(name)] == label
  others = source_lib.hold_out_images(source, 2, seed=1)[1]
  assert others.ids != held.ids


def test_smaller_shares_are_parts_of_larger_ones():
  source = Numbers([0] * 20 + [1] * 7 + [2], ('ant', 'bee', 'cat'))
  kept: set[str] = set()
  for share, numbers in (
    (0.01, [2, 2, 1]),
    (0.25, [5, 2, 1]),
    (0.5, [10, 4, 1]),
    (0.9, [18, 6, 1]),
    (1.0, [20, 7, 1]),
  ):
    part = source_lib.keep_images(source, share, seed=0)
    assert part.class_names == source.class_names
    assert np.bincount(part.labels).tolist() == numbers
    for name, label in zip(part.ids, part.labels, strict=True):
      assert source.labels[source.ids.index(name)] == label
    assert kept < set(part.ids)
    kept = set(part.ids)
  assert kept == set(source.ids)


def test_which_share_depends_on_ids_and_seed_alone():
  source = Numbers([0, 1] * 10, ('ant', 'bee'))
  part = source_lib.keep_images(source, 0.3, seed=0)
  again = source_lib.SubsetSource(source, np.arange(20)[::-1])
  assert set(source_lib.keep_images(again, 0.3, seed=0).ids) == set(part.ids)
  assert source_lib.keep_images(source, 0.3, seed=1).ids != part.ids
  # All images are the source itself: what was computed of it is found again.
  assert source_lib.keep_images(source, 1.0, seed=0) is source


@pytest.mark.parametrize('share', [0.0, -0.5, 1.01, float('nan')])
def test_a_share_lies_between_none_and_all(share):
  with pytest.raises(InputError, match=f'train_share={share} must be above 0'):
    source_lib.keep_images(SOURCE, share, seed=0)


@pytest.mark.parametrize('count', [0, -1, 4])
def test_two_images_of_a_class_must_be_left(count):
  source = Numbers([0] * 5 + [1] * 6, ('ant', 'bee'))
  with pytest.raises(InputError, match="of class 'ant'"):
    source_lib.hold_out_images(source, count, seed=0)
