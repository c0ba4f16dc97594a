"""Tests of `msba_jax.layers.window_attention`."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from msba_jax.layers import attention, window_attention
from msba_jax.layers import windows as windows_lib

SIDES = st.integers(1, 5)
DIRECTIONS = ['horizontal', 'vertical', 'diagonal', 'antidiagonal']


def attend_windows(*given, **options):
  """Compiled, which is quicker here than one operation after the other."""
  *given, windows = given
  function = functools.partial(
    window_attention.attend_windows, windows=windows, **options
  )
  return jax.jit(function)(*given)


def arrays(rng, tokens, n=2, h=2, d=4, f=3):
  """Queries, keys and values."""
  return tuple(
    jnp.asarray(rng.normal(size=(n, tokens, h, size)), jnp.float32)
    for size in (d, d, f)
  )


def reference(queries, keys, values, windows):
  """Window by window in float64, overlaps averaged."""
  queries, keys, values = (
    np.asarray(x, np.float64) for x in (queries, keys, values)
  )
  total = np.zeros_like(values)
  count = np.zeros((windows.tokens, 1, 1))
  for indices, valid in zip(windows.indices, windows.valid, strict=True):
    i = indices[valid]
    scores = np.einsum('nshd,nthd->nhst', queries[:, i], keys[:, i])
    weights = np.exp(scores / np.sqrt(queries.shape[-1]))
    weights /= weights.sum(-1, keepdims=True)
    total[:, i] += np.einsum('nhst,nthf->nshf', weights, values[:, i])
    count[i] += 1
  return total / np.maximum(count, 1)


def stripes(height, width, direction, stripe):
  return windows_lib.stripe_windows(
    height, width, direction=direction, stripe=stripe
  )


@pytest.fixture(params=['at once', 'image by image', 'row by row'])
def steps(request, monkeypatch):
  """Scores of all images together, of one image, of a few rows."""
  if request.param == 'image by image':
    monkeypatch.setattr(window_attention, 'MOST_SCORES', 0)
  if request.param == 'row by row':
    monkeypatch.setattr(window_attention, 'MOST_SCORES', 0)
    monkeypatch.setattr(window_attention, 'STEP_SCORES', 24)


@pytest.mark.usefixtures('steps')
@hypothesis.settings(max_examples=6)
@hypothesis.given(
  height=SIDES, width=SIDES, stripe=st.integers(1, 4),
  direction=st.sampled_from(DIRECTIONS), n=st.integers(1, 3),
  seed=st.integers(0, 99),
)  # fmt: skip
def test_stripes_equal_the_reference(height, width, stripe, direction, n, seed):
  windows = stripes(height, width, direction, stripe)
  given = arrays(np.random.default_rng(seed), height * width, n=n)
  np.testing.assert_allclose(
    attend_windows(*given, windows), reference(*given, windows), atol=2e-6
  )


@pytest.mark.parametrize('attend', [None, attention.attend])
@pytest.mark.parametrize(
  'windows',
  [
    windows_lib.sliding_windows(4, 5, window=3, stride=2),
    windows_lib.partition_windows(5, 3, parts=2),
    windows_lib.sliding_windows(4, 4, window=2, stride=2),
    stripes(3, 4, 'diagonal', 3),
  ],
  ids=['overlapping', 'parts', 'squares', 'diagonal'],
)
def test_windows_equal_the_reference(variant, rng, windows, attend):
  given = arrays(rng, windows.tokens)
  ours = variant(
    functools.partial(
      window_attention.attend_windows, windows=windows, attend=attend
    )
  )
  np.testing.assert_allclose(
    ours(*given), reference(*given, windows), atol=2e-6
  )


@pytest.mark.parametrize('direction', DIRECTIONS)
def test_a_few_places_have_the_messages_of_all(variant, rng, direction):
  windows, places = stripes(4, 6, direction, 2), np.array([3, 23, 8, 3])
  given = arrays(rng, 24)
  ours = variant(
    functools.partial(
      window_attention.attend_windows, windows=windows, places=places
    )
  )
  np.testing.assert_allclose(
    ours(*given), reference(*given, windows)[:, places], atol=2e-6
  )


def test_a_place_in_no_window_has_no_message(rng):
  windows = windows_lib.Windows(
    np.array([[0, 1], [3, 0]]), np.ones((2, 2)) > 0, 4
  )
  windows.valid[1, 1] = False
  found = attend_windows(*arrays(rng, 4), windows, places=np.array([2, 3]))
  np.testing.assert_array_equal(found[:, 0], 0)
  assert np.all(np.asarray(found[:, 1]) != 0)


def test_places_in_windows_that_overlap_are_refused(rng):
  windows = windows_lib.sliding_windows(4, 5, window=3, stride=2)
  with pytest.raises(ValueError, match='do not overlap'):
    attend_windows(*arrays(rng, 20), windows, places=np.array([0]))


def test_one_window_of_everything_is_attention(rng):
  given = arrays(rng, 12)
  windows = stripes(3, 4, 'diagonal', 4)
  np.testing.assert_allclose(
    attend_windows(*given, windows), attention.attend(*given), atol=2e-6
  )


def test_large_windows_take_the_attention_of_the_library(monkeypatch, rng):
  given = arrays(rng, 12)
  windows = stripes(3, 4, 'diagonal', 3)
  original, seen = attention.attend, []

  def attend(queries, keys, values, *, mask):
    seen.append((queries.shape, mask.shape))
    return original(queries, keys, values, mask=mask)

  monkeypatch.setattr(window_attention.attention, 'attend', attend)
  attend_windows(*given, windows)
  assert not seen
  monkeypatch.setattr(window_attention, 'CHUNKED_SCORES', 81)
  messages = attend_windows(*given, windows)
  assert seen == [((2, 2, 9, 2, 4), (1, 2, 1, 1, 9))]
  np.testing.assert_allclose(messages, reference(*given, windows), atol=2e-6)


def test_order_of_windows_and_of_their_tokens_does_not_matter(rng):
  windows = stripes(4, 4, 'diagonal', 3)
  given = arrays(rng, 16)
  rows = rng.permutation(2)
  places = rng.permutation(windows.indices.shape[1])
  shuffled = windows_lib.Windows(
    windows.indices[rows][:, places], windows.valid[rows][:, places], 16
  )
  np.testing.assert_allclose(
    attend_windows(*given, shuffled),
    attend_windows(*given, windows),
    atol=2e-6,
  )


def test_permuting_images_and_heads_permutes_the_result(rng):
  windows = stripes(3, 4, 'antidiagonal', 3)
  given = arrays(rng, 12, n=3)
  images, heads = rng.permutation(3), np.array([1, 0])
  shuffled = (x[images][:, :, heads] for x in given)
  expected = attend_windows(*given, windows)[images][:, :, heads]
  np.testing.assert_allclose(
    attend_windows(*shuffled, windows), expected, atol=1e-6
  )


@pytest.mark.usefixtures('steps')
@pytest.mark.parametrize('direction', ['horizontal', 'diagonal'])
def test_nothing_flows_between_stripes_and_from_what_fills_up(rng, direction):
  # Three lines in two stripes: the second one is filled up with token 0.
  windows = stripes(3, 3, direction, 2)
  given = arrays(rng, 9)
  last = windows.indices[1][windows.valid[1]]

  def loss(given):
    return jnp.sum(attend_windows(*given, windows)[:, last] ** 2)

  others = np.setdiff1d(np.arange(9), last)
  for gradient in jax.jit(jax.grad(loss))(given):
    assert np.all(np.asarray(gradient)[:, others] == 0)
    assert np.all(np.any(np.asarray(gradient)[:, last] != 0, axis=(2, 3)))


@pytest.mark.usefixtures('steps')
def test_gradients(rng):
  windows = stripes(2, 3, 'diagonal', 2)
  given = arrays(rng, 6, h=1, d=2, f=2)
  check_grads(
    lambda *given: attend_windows(*given, windows),
    given, 1, atol=1e-2, rtol=1e-2,
  )  # fmt: skip


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('stripe', [1, 2])
def test_the_dtype_of_the_values_comes_back(rng, dtype, stripe):
  windows = stripes(3, 3, 'diagonal', stripe)
  queries, keys, values = arrays(rng, 9)
  values = values.astype(dtype)
  messages = attend_windows(queries, keys, values, windows)
  assert messages.dtype == dtype
  expected = reference(queries, keys, values.astype(jnp.float32), windows)
  tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
  np.testing.assert_allclose(
    messages.astype(jnp.float32), expected, atol=tolerance
  )


def test_large_scores_neither_overflow_nor_reach_what_is_filled_up(rng):
  windows = stripes(3, 3, 'vertical', 2)
  queries, keys, values = arrays(rng, 9)
  messages = attend_windows(queries * 1e4, keys * 1e4, values, windows)
  # One key of every row has all the weight.
  expected = np.zeros(values.shape)
  for indices, valid in zip(windows.indices, windows.valid, strict=True):
    i = indices[valid]
    scores = np.einsum('nshd,nthd->nhst', queries[:, i], keys[:, i])
    best = np.moveaxis(np.argmax(scores, axis=-1), 1, 2)
    expected[:, i] = np.take_along_axis(
      np.asarray(values)[:, i], best[..., None], axis=1
    )
  np.testing.assert_allclose(messages, expected, atol=1e-6)


@pytest.mark.parametrize('attend', [None, attention.attend])
def test_an_empty_window_gives_nothing(rng, attend):
  valid = np.array([[True, True], [False, False]])
  windows = windows_lib.Windows(np.array([[0, 2], [0, 0]]), valid, 3)
  given = arrays(rng, 3)
  messages = attend_windows(*given, windows, attend=attend)
  np.testing.assert_allclose(messages, reference(*given, windows), atol=2e-6)
  assert np.all(np.asarray(messages[:, 1]) == 0)


@pytest.mark.parametrize('direction', ['vertical', 'diagonal'])
def test_images_of_a_batch_do_not_matter(rng, direction):
  windows = stripes(4, 4, direction, 2)
  given = arrays(rng, 16, n=3)
  alone = [
    attend_windows(*(x[i : i + 1] for x in given), windows) for i in range(3)
  ]
  np.testing.assert_allclose(
    attend_windows(*given, windows), jnp.concatenate(alone), atol=1e-6
  )


@pytest.mark.usefixtures('unchecked')
def test_errors_name_the_shapes(rng):
  windows = stripes(2, 3, 'horizontal', 1)
  queries, keys, values = arrays(rng, 6)
  with pytest.raises(ValueError, match='belong to 6 tokens, not to 5'):
    attend_windows(queries[:, :5], keys[:, :5], values[:, :5], windows)
  with pytest.raises(ValueError, match=r'do not fit together: .*\(2, 6, 1, 4'):
    attend_windows(queries, keys[:, :, :1], values, windows)
  with pytest.raises(ValueError, match='do not fit together'):
    attend_windows(queries, keys, values[:, :5], windows)
