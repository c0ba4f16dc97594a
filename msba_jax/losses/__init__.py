"""Losses: pure functions, unreduced over images, proxies or pairs.

Every metric loss is called as `loss(embeddings (n, e), labels (n,), *, ...)`,
those over proxies with `proxies (c, e)` as third argument. `valid (n,)` is
False for padded images, which have exactly zero influence and zero gradient.
An anchor without a positive counts zero. `msba_losses`, `solo_losses`,
`castle_losses` and `nexus_losses` turn a loss into the terms of an objective.

Letters of the axes are those of `msba_jax.layers`: `n` images, `m` what they
meet, `e` embedding, `c` classes.
"""

from msba_jax.losses.causal import castle_losses, counterfactual_effect
from msba_jax.losses.classification import label_smoothed_cross_entropy
from msba_jax.losses.consistency import solo_consistency
from msba_jax.losses.contrastive import nt_xent, supervised_contrastive
from msba_jax.losses.objective import (
  msba_losses,
  published_reduction,
  solo_losses,
)
from msba_jax.losses.pairwise import (
  batch_hard_triplet,
  multi_similarity,
  pairwise_sigmoid,
)
from msba_jax.losses.proxies import arcface, normalized_softmax, proxy_anchor
from msba_jax.losses.reduction import (
  Reduction,
  masked_mean,
  mean_over_anchors,
  mean_over_images,
  mean_over_positive_pairs,
  mean_over_proxies,
  sum_over_pairs_per_image,
)
from msba_jax.losses.sharded import (
  PositiveSums,
  ring_nt_xent,
  ring_supervised_contrastive,
)
from msba_jax.losses.similarity import negative_pairs, positive_pairs
from msba_jax.losses.sparsity import (
  kept_mass_loss,
  narrowing_loss,
  nexus_losses,
  ratio_loss,
)
from msba_jax.losses.term import LossTerm, total_loss

__all__ = [
  'LossTerm',
  'PositiveSums',
  'Reduction',
  'arcface',
  'batch_hard_triplet',
  'castle_losses',
  'counterfactual_effect',
  'kept_mass_loss',
  'label_smoothed_cross_entropy',
  'masked_mean',
  'mean_over_anchors',
  'mean_over_images',
  'mean_over_positive_pairs',
  'mean_over_proxies',
  'msba_losses',
  'multi_similarity',
  'narrowing_loss',
  'negative_pairs',
  'nexus_losses',
  'normalized_softmax',
  'nt_xent',
  'pairwise_sigmoid',
  'positive_pairs',
  'proxy_anchor',
  'published_reduction',
  'ratio_loss',
  'ring_nt_xent',
  'ring_supervised_contrastive',
  'solo_consistency',
  'solo_losses',
  'sum_over_pairs_per_image',
  'supervised_contrastive',
  'total_loss',
]
