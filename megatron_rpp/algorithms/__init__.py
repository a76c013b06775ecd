"""The mathematics of REINFORCE++ and PPO: tensors and an explicit process group in, tensors out.

There is no Megatron here, no configuration object and no global state. Shapes: scores [B] (one per
response), per-token tensors and their bool mask [B, T].

From a score to an advantage: ``shaping`` -> ``kl`` -> ``returns`` (PPO: ``gae``) -> ``statistics`` ->
``advantages``, whose ``compute_advantages`` takes the last three steps. From an advantage to a
gradient: ``correction`` -> ``losses``. ``numerics`` keeps values under a zero mask out of both.
``preferences`` has the losses of a reward model.
"""

from megatron_rpp.algorithms.advantages import ALGORITHMS, group_baseline
from megatron_rpp.algorithms.correction import (
    CORRECTIONS,
    correction_weights,
    effective_share,
    importance_ratio,
)
from megatron_rpp.algorithms.gae import gae
from megatron_rpp.algorithms.kl import KL_KINDS, adapted_kl_factor, kl_estimate
from megatron_rpp.algorithms.losses import (
    AGGREGATIONS,
    PolicyStats,
    aggregation_weights,
    clipped_values,
    policy_loss,
    policy_stats,
    value_loss,
)
from megatron_rpp.algorithms.preferences import bradley_terry_loss, correlation, squared_error
from megatron_rpp.algorithms.returns import returns_to_go, token_rewards
from megatron_rpp.algorithms.shaping import ShapingStats, shape_scores
from megatron_rpp.algorithms.statistics import Moments, global_whiten, moments

__all__ = [
    "AGGREGATIONS",
    "ALGORITHMS",
    "CORRECTIONS",
    "KL_KINDS",
    "Moments",
    "PolicyStats",
    "ShapingStats",
    "adapted_kl_factor",
    "aggregation_weights",
    "bradley_terry_loss",
    "clipped_values",
    "correlation",
    "correction_weights",
    "effective_share",
    "gae",
    "global_whiten",
    "group_baseline",
    "importance_ratio",
    "kl_estimate",
    "moments",
    "policy_loss",
    "policy_stats",
    "returns_to_go",
    "shape_scores",
    "squared_error",
    "token_rewards",
    "value_loss",
]
