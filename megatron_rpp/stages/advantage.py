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
    moments,
    shape_scores,
)
from megatron_rpp.config import AlgorithmConfig, RewardConfig
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.stages import nonfinite


@dataclass(frozen=True)
class ValueStats:
    """How well the critic predicted the returns before its update, over all tokens of all replicas."""

    values: Moments
    returns: Moments
    errors: Moments
    """Of return - value."""

    @property
    def explained_variance(self) -> float:
        """1 - Var(return - value) / Var(return): 1 is perfect, 0 no better than a constant. 0 if all
        returns are equal."""
        return 1 - self.errors.var / self.returns.var if self.returns.var else 0.0


@dataclass(frozen=True)
class AdvantageStats:
    """Over all replicas: scores per sample, and advantages per token before their normalisation."""

    scores: ShapingStats
    advantages: Moments
    values: ValueStats | None
    """None if there is no critic."""


def compute_advantages(
    buffer: RolloutBuffer,
    algorithm: AlgorithmConfig,
    reward: RewardConfig,
    *,
    group: dist.ProcessGroup,
) -> AdvantageStats:
    """Fills `advantages`, `returns` and, if the algorithm corrects for the rollout engine,
    `rollout_weights` [R]. With ppo, `values` is filled before. Collective over `group` (DP × CP) and over the world.

    Raises RunFailure, on every rank, if log-probs, values or KL are not finite (nonfinite.py).
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
            "the critic's values": buffer.values,
            f"the KL estimates ({algorithm.kl_estimator})": kl,
        },
    )
    advantage, returns, advantage_moments = advantages.compute_advantages(
        algorithm.name,
        scores,
        buffer.padded(buffer.mask),
        group_ids=buffer.group_ids,
        kl=None if kl is None else buffer.padded(kl),
        kl_coef=algorithm.kl_coef,
        gamma=algorithm.gamma,
        values=None if buffer.values is None else buffer.padded(buffer.values),
        gae_lambda=algorithm.gae_lambda,
        group=group,
    )
    buffer.advantages, buffer.returns = buffer.flat(advantage), buffer.flat(returns)
    if algorithm.rollout_correction != "none":
        ratio = importance_ratio(buffer.old_logprobs, buffer.rollout_logprobs)
        buffer.rollout_weights = correction_weights(
            ratio, algorithm.rollout_correction, algorithm.rollout_correction_max
        )
    return AdvantageStats(score_stats, advantage_moments, _value_stats(buffer, group))


def _value_stats(buffer: RolloutBuffer, group: dist.ProcessGroup) -> ValueStats | None:
    if buffer.values is None:
        return None
    assert buffer.returns is not None
    values, returns = buffer.values.double(), buffer.returns.double()
    return ValueStats(
        *(moments(column, buffer.mask, group) for column in (values, returns, returns - values))
    )
