"""The mathematics of REINFORCE++: tensors and an explicit process group in, tensors out.

No Megatron, no configuration object, no global state. Shapes: scores [B] (responses), per-token
tensors and their bool mask [B, T]. ``kl`` -> ``returns`` -> ``statistics`` -> ``advantages`` is
the way from a score to an advantage, ``losses`` the way from an advantage to a gradient;
``numerics`` keeps what lies under a zero mask out of both. The function that goes the whole way is
``advantages.advantages``, not lifted here because it would hide its module.
"""

from megatron_rpp.algorithms.advantages import ALGORITHMS, group_baseline, shape_scores
from megatron_rpp.algorithms.kl import KL_KINDS, kl_estimate
from megatron_rpp.algorithms.losses import (
    AGGREGATIONS,
    PolicyStats,
    aggregate,
    policy_loss,
    policy_stats,
)
from megatron_rpp.algorithms.returns import returns_to_go, token_rewards
from megatron_rpp.algorithms.statistics import Moments, global_whiten, moments

__all__ = [
    "AGGREGATIONS",
    "ALGORITHMS",
    "KL_KINDS",
    "Moments",
    "PolicyStats",
    "aggregate",
    "global_whiten",
    "group_baseline",
    "kl_estimate",
    "moments",
    "policy_loss",
    "policy_stats",
    "returns_to_go",
    "shape_scores",
    "token_rewards",
]
