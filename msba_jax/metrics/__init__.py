"""How good a retrieval is, and how sure one can be of it.

Scores come one a query, as NumPy arrays; means and intervals are made of them.

Attributes:
  evaluate_retrieval, summarize: scores by label, and their means.
  evaluate_revisited: the revisited Oxford and Paris protocol.
  recall_at_k, precision_at_k, r_precision, map_at_r, average_precision: each
    metric of given ranks.
  bootstrap_interval, paired_bootstrap: intervals over seeds, classes, queries.
  attention_share, block_flops, compiled_cost: what attention costs.
  fidelity: how near sparse attention is to dense.
  alignment_score, correspondence_score, ridge_map: A and C of a representation.
  fit_ac: what a model reaches that is trained on it, as a polynomial of both.
"""

from msba_jax.metrics.alignment import (
  ACFit,
  ac_features,
  alignment_score,
  fit_ac,
)
from msba_jax.metrics.correspondence import correspondence_score, soft_argmax
from msba_jax.metrics.cost import (
  CompiledCost,
  attention_share,
  block_flops,
  compiled_cost,
)
from msba_jax.metrics.fidelity import Fidelity, fidelity
from msba_jax.metrics.intervals import (
  Interval,
  bootstrap_interval,
  paired_bootstrap,
)
from msba_jax.metrics.rank_metrics import (
  Convention,
  average_precision,
  map_at_r,
  precision_at_k,
  r_precision,
  recall_at_k,
)
from msba_jax.metrics.retrieval import (
  RetrievalScores,
  evaluate_retrieval,
  summarize,
)
from msba_jax.metrics.revisited import (
  Difficulty,
  Relevance,
  evaluate_revisited,
)
from msba_jax.metrics.ridge import RidgeMap, ridge_map

__all__ = [
  'ACFit',
  'CompiledCost',
  'Convention',
  'Difficulty',
  'Fidelity',
  'Interval',
  'Relevance',
  'RetrievalScores',
  'RidgeMap',
  'ac_features',
  'alignment_score',
  'attention_share',
  'average_precision',
  'block_flops',
  'bootstrap_interval',
  'compiled_cost',
  'correspondence_score',
  'evaluate_retrieval',
  'evaluate_revisited',
  'fidelity',
  'fit_ac',
  'map_at_r',
  'paired_bootstrap',
  'precision_at_k',
  'r_precision',
  'recall_at_k',
  'ridge_map',
  'soft_argmax',
  'summarize',
]
