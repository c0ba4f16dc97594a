"""Every primitive for foreign projects: eager, under jit, and under pmap."""

import functools

import chex
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from msba_jax import layers, losses


def draw(*shape, seed=0):
  rng = np.random.default_rng((seed, *shape))
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


TOKENS = draw(6, 2, 4), draw(8, 2, 4), draw(8, 2, 3)
IMAGES = draw(3, 2, 2, 4), draw(4, 3, 2, 4), draw(4, 3, 2, 5)
REGIONS = draw(5, 2, 2, 4), draw(6, 2, 2, 4), draw(6, 2, 2, 3)
CHOICE = jnp.array([[0, 3], [2, -1], [-1, -1]])
LABELS = jnp.array([0, 0, 1, 1, 2, 0])


def dense(function, **options):
  return functools.partial(function, implementation='dense', **options)


def blocks_of_tokens(queries, keys, values):
  named = layers.block_mask(CHOICE, 4)
  mask = jnp.repeat(jnp.repeat(named, 2, axis=0), 2, axis=1)
  return dense(layers.attend)(queries, keys, values, mask=mask)


def image_blocks(queries, keys, values):
  mask = layers.block_mask(CHOICE, 4)
  return dense(layers.attend_joint_tokens)(
    queries, keys, values, image_mask=mask
  )


def on_pixels(values, weights):
  """Where points stand on centres of patches, no pixel is interpolated."""
  return jnp.einsum('nyxhf,nthlp->nthf', values[:, :1, 1:2], weights)


def second_pixel(values, weights):
  points = jnp.broadcast_to(jnp.array([0.5, 0.25]), (*weights.shape, 2))
  return layers.deformable_attention([values], points, weights)


ONE_CHART = layers.ManifoldParams(
  scales=draw(1, 4), charts=draw(1, 4, 5), biases=draw(1, 5)
)


def charted(inputs, *, variant):
  found = layers.manifold_keys(
    inputs, ONE_CHART, variant=variant, activation=None
  )
  return found.keys


def projected(inputs):
  kernel = ONE_CHART.scales[0][:, None] * ONE_CHART.charts[0]
  return inputs @ kernel + ONE_CHART.biases[0][None, None]


def paired_sums(embeddings):
  return jnp.sum(losses.nt_xent(embeddings, LABELS), axis=1)


# Name, function, arguments, and what it equals.
PRIMITIVES = (
  (
    'attend',
    functools.partial(layers.attend, chunk=3),
    TOKENS,
    dense(layers.attend),
  ),
  (
    'attend_across_images',
    functools.partial(layers.attend_across_images, chunk=2),
    REGIONS,
    dense(layers.attend_across_images),
  ),
  (
    'attend_joint_tokens',
    functools.partial(layers.attend_joint_tokens, chunk=4),
    IMAGES,
    dense(layers.attend_joint_tokens),
  ),
  (
    'attend_blocks',
    functools.partial(layers.attend_blocks, block_indices=CHOICE, block=2),
    TOKENS,
    blocks_of_tokens,
  ),
  (
    'attend_image_blocks',
    functools.partial(layers.attend_image_blocks, image_indices=CHOICE),
    IMAGES,
    image_blocks,
  ),
  (
    'deformable_attention',
    second_pixel,
    (draw(2, 2, 3, 2, 4), draw(2, 5, 2, 1, 3)),
    on_pixels,
  ),
  (
    'manifold_keys',
    functools.partial(charted, variant='simple'),
    (draw(2, 3, 4),),
    projected,
  ),
  (
    'ring_supervised_contrastive',
    functools.partial(
      losses.ring_supervised_contrastive,
      labels=LABELS,
      axis_name=None,
      chunk=4,
    ),
    (draw(6, 4),),
    functools.partial(losses.supervised_contrastive, labels=LABELS),
  ),
  (
    'ring_nt_xent',
    lambda x: losses.ring_nt_xent(x, LABELS, axis_name=None, chunk=4).losses,
    (draw(6, 4),),
    paired_sums,
  ),
)


class PrimitivesTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
  @parameterized.named_parameters(*PRIMITIVES)
  def test_equals_the_dense_form(self, function, arguments, expected):
    np.testing.assert_allclose(
      self.variant(function)(*arguments), expected(*arguments), atol=2e-6
    )

  @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
  def test_the_best_blocks(self):
    choose = functools.partial(layers.block_topk, block=2, keep=2)
    found = self.variant(choose)(*TOKENS[:2])
    means = [np.asarray(x).reshape(-1, 2, 2, 4).mean(1) for x in TOKENS[:2]]
    scores = np.einsum('ihd,jhd->hij', *means)
    np.testing.assert_array_equal(found, np.argsort(-scores, axis=-1)[..., :2])
