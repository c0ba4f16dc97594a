"""Pure functions: attention between images, masks, windows, pooling, search.

They import jax (and NumPy, which comes with it) and jaxtyping and nothing else,
so that any JAX project can take one of them. Annotations and einsum use one
table of axis letters:

| letter | axis | letter | axis |
|---|---|---|---|
| `n` | images asking (queries) | `h` | attention heads |
| `m` | images answering (keys) | `d` | feature of queries and keys |
| `t` | tokens of an asking image | `f` | feature of values, output |
| `s` | tokens of an answering image | `r` | regions per image |
| `l` | pyramid level, fine to coarse | `k` | neighbours or blocks kept |
| `e` | embedding | `c` | classes |
| `b` | any leading axes | `q` | queries of a search |
| `i`, `j` | blocks of queries, of keys | `g` | heads and leading axes as one |
| `p` | points that are read | | |
"""

from msba_jax.layers.attention import (
  attend,
  attention_scores,
  attention_weights,
  log_normalizer,
)
from msba_jax.layers.bidirectional import (
  BidirectionalWeights,
  Messages,
  bidirectional_messages,
  bidirectional_weights,
)
from msba_jax.layers.block_choice import block_mask, block_topk, kept_share
from msba_jax.layers.block_means import (
  attend_blocks_and_means,
  weights_by_block,
)
from msba_jax.layers.causal import (
  GateParams,
  acyclicity_penalty,
  causal_graph,
  causal_scores,
  directed_gate,
  propagate_causal_graph,
  transitive_influence,
)
from msba_jax.layers.choice import (
  neighbouring_mixture,
  straight_through,
  switch_by_image,
)
from msba_jax.layers.deformable import deformable_attention
from msba_jax.layers.depthwise import depthwise_convolution
from msba_jax.layers.distributed import gathered, ring
from msba_jax.layers.heads import (
  head_alignment,
  prompt_alignment,
  prompt_tokens,
  select_heads,
  tokens_of_masks,
)
from msba_jax.layers.in_batch import (
  attend_across_images,
  attend_joint_tokens,
)
from msba_jax.layers.interventions import (
  counterfactual_attention,
  counterfactual_weights,
  intervention_effect,
  leave_one_out_effect,
  perturbed_features,
)
from msba_jax.layers.manifold import (
  ChartKeys,
  ManifoldParams,
  manifold_keys,
  membership_penalty,
)
from msba_jax.layers.masks import (
  causal_mask,
  neighbour_mask,
  padding_mask,
  same_image_mask,
  self_mask,
)
from msba_jax.layers.nearest import Neighbours, exact_topk
from msba_jax.layers.normalize import safe_normalize
from msba_jax.layers.pooling import (
  generalized_mean_pool,
  generalized_mean_windows,
  region_partition,
)
from msba_jax.layers.positions import resize_positions
from msba_jax.layers.sparse import attend_blocks, attend_image_blocks
from msba_jax.layers.sparsity import (
  keep_counts,
  relative_mask,
  row_statistics,
  soft_keep,
  sparse_weights,
  topk_indices,
  topk_mask,
)
from msba_jax.layers.window_attention import attend_windows
from msba_jax.layers.windows import (
  Windows,
  partition_windows,
  sliding_windows,
  stripe_windows,
  window_merge,
  window_partition,
)

__all__ = [
  'BidirectionalWeights',
  'ChartKeys',
  'GateParams',
  'ManifoldParams',
  'Messages',
  'Neighbours',
  'Windows',
  'acyclicity_penalty',
  'attend',
  'attend_across_images',
  'attend_blocks',
  'attend_blocks_and_means',
  'attend_image_blocks',
  'attend_joint_tokens',
  'attend_windows',
  'attention_scores',
  'attention_weights',
  'bidirectional_messages',
  'bidirectional_weights',
  'block_mask',
  'block_topk',
  'causal_graph',
  'causal_mask',
  'causal_scores',
  'counterfactual_attention',
  'counterfactual_weights',
  'deformable_attention',
  'depthwise_convolution',
  'directed_gate',
  'exact_topk',
  'gathered',
  'generalized_mean_pool',
  'generalized_mean_windows',
  'head_alignment',
  'intervention_effect',
  'keep_counts',
  'kept_share',
  'leave_one_out_effect',
  'log_normalizer',
  'manifold_keys',
  'membership_penalty',
  'neighbour_mask',
  'neighbouring_mixture',
  'padding_mask',
  'partition_windows',
  'perturbed_features',
  'prompt_alignment',
  'prompt_tokens',
  'propagate_causal_graph',
  'region_partition',
  'relative_mask',
  'resize_positions',
  'ring',
  'row_statistics',
  'safe_normalize',
  'same_image_mask',
  'select_heads',
  'self_mask',
  'sliding_windows',
  'soft_keep',
  'sparse_weights',
  'straight_through',
  'stripe_windows',
  'switch_by_image',
  'tokens_of_masks',
  'topk_indices',
  'topk_mask',
  'transitive_influence',
  'weights_by_block',
  'window_merge',
  'window_partition',
]
