"""Stage 4, advantage: from scores and log-probs to advantages, normalised over the global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_rpp.algorithms import (
    Moments,
    ShapingStats,
    advantages,
    correction_weights,
    importance_ratio,
    kl_estimate,
    shape_scores,
)
from megatron_rpp.config import AlgorithmConfig, RewardConfig
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.stages import nonfinite


@dataclass(frozen=True)
class AdvantageStats:
    """Over all replicas: scores per sample, and advantages per token before their normalisation."""

    scores: ShapingStats
    advantages: Moments


def compute_advantages(
    buffer: RolloutBuffer,
    algorithm: AlgorithmConfig,
    reward: RewardConfig,
    *,
    group: dist.ProcessGroup,
) -> AdvantageStats:
    """Fills `advantages`, `returns` and, if the algorithm corrects for the rollout engine,
    `rollout_weights` [R]. Collective over `group` (DP × CP) and over the world.

    Raises RunFailure, on every rank, if log-probs or KL are not finite (nonfinite.py).
    """
    assert buffer.scores is not None and buffer.old_logprobs is not None
    scores, score_stats = shape_scores(
        buffer.scores, normalize=reward.normalize, scale=reward.scale, clip=reward.clip, group=group
    )
    kl = None
    if buffer.ref_logprobs is not None:
        kl = kl_estimate(buffer.old_logprobs, buffer.ref_logprobs, algorithm.kl_estimator)
    nonfinite.check_columns(
        buffer,
        {
            "the policy's log-probs": buffer.old_logprobs,
            "the reference's log-probs": buffer.ref_logprobs,
            f"the KL estimates ({algorithm.kl_estimator})": kl,
        },
    )
    values, returns, moments = advantages.compute_advantages(
        algorithm.name,
        scores,
        buffer.padded(buffer.mask),
        group_ids=buffer.group_ids,
        kl=None if kl is None else buffer.padded(kl),
        kl_coef=algorithm.kl_coef,
        gamma=algorithm.gamma,
        group=group,
    )
    buffer.advantages, buffer.returns = buffer.flat(values), buffer.flat(returns)
    if algorithm.rollout_correction != "none":
        ratio = importance_ratio(buffer.old_logprobs, buffer.rollout_logprobs)
        buffer.rollout_weights = correction_weights(
            ratio, algorithm.rollout_correction, algorithm.rollout_correction_max
        )
    return AdvantageStats(score_stats, moments)
