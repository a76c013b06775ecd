"""Stage 5, update: epochs of mini-batches over the rollouts of a step, with the clipped loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_rpp.algorithms import kl_estimate, policy_loss, policy_stats
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config import AlgorithmConfig, RolloutConfig, TrainConfig
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.records import MicroBatch, StepKey
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.stages.logprobs import token_logprobs
from megatron_rpp.stages.minibatches import (
    Objective,
    TokenSums,
    UpdateProgress,
    column,
    train_epochs,
)


@dataclass(frozen=True)
class UpdateStats:
    """Means over all tokens of the step's mini-batches (loss: over mini-batches).

    Mini-batches whose update was skipped do not count; if all were skipped, everything is 0.
    """

    loss: float
    clip_fraction: float
    approx_kl: float
    entropy: float
    ratio_max: float
    grad_norm: float
    learning_rate: float
    skip_reasons: list[str]
    """One text per skipped update."""

    @classmethod
    def of(cls, progress: UpdateProgress, policy: TrainedModel) -> UpdateStats:
        return cls(
            loss=progress.loss,
            clip_fraction=progress.per_token(3),
            approx_kl=progress.per_token(4),
            entropy=progress.per_token(5),
            ratio_max=max((row[6] for row in progress.rows), default=0.0),
            grad_norm=progress.grad_norm,
            learning_rate=policy.optimizer.param_groups[0]["lr"],
            skip_reasons=progress.faults,
        )


def _objective(
    model: torch.nn.ModuleList,
    buffer: RolloutBuffer,
    algorithm: AlgorithmConfig,
    *,
    temperature: float,
) -> Objective:
    """The loss of the policy. It reports the loss sum, count, tokens, clipped tokens, approximate KL,
    entropy and the largest ratio."""
    sums = TokenSums(buffer, algorithm.aggregation)

    def loss(
        batch: MicroBatch, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logprobs, entropy = token_logprobs(
            model, batch, hidden, temperature=temperature, with_entropy=True
        )
        assert entropy is not None
        assert buffer.old_logprobs is not None and buffer.advantages is not None
        logprobs, entropy = logprobs[None], entropy[None]
        old, advantages, mask = (
            column(values, batch, hidden)
            for values in (buffer.old_logprobs, buffer.advantages, buffer.mask)
        )
        per_token = policy_loss(
            logprobs,
            old,
            advantages,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
        )
        if buffer.rollout_weights is not None:
            per_token = per_token * column(buffer.rollout_weights, batch, hidden)
        if algorithm.entropy_coef:
            per_token = per_token - algorithm.entropy_coef * entropy
        if algorithm.kl_loss_coef:
            assert buffer.ref_logprobs is not None
            kl = kl_estimate(logprobs, column(buffer.ref_logprobs, batch, hidden), "k2")
            per_token = per_token + algorithm.kl_loss_coef * kl
        total, count = sums.loss(batch, per_token)
        stats = policy_stats(
            logprobs.detach(),
            old,
            advantages,
            mask=mask,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
        )
        entropy_sum = torch.where(mask, entropy.detach(), 0.0).sum()
        report = (total.detach(), count, *stats[:3], entropy_sum, stats.ratio_max)
        return total, count.int(), torch.stack([value.double() for value in report])

    return Objective(loss, "update", sums=6, peaks=1)


def update_policy(
    policy: TrainedModel,
    buffer: RolloutBuffer,
    algorithm: AlgorithmConfig,
    *,
    train: TrainConfig,
    rollout: RolloutConfig,
    key: StepKey,
    state: RunState,
    progress: UpdateProgress,
    safe_point: Callable[[], None],
) -> UpdateStats:
    """Updates `policy` on the rollouts of a step, with the same result on any layout. Collective.

    Args:
        buffer: this replica's shard, with old_logprobs, advantages and, if there is a KL loss,
            ref_logprobs.
        algorithm: with the KL coefficients of this step.
        state: counts the skipped updates.
        progress, safe_point: see train_epochs.
    Raises:
        RunFailure: too many updates in a row were skipped (nonfinite.py).
    """
    objective = _objective(policy.model, buffer, algorithm, temperature=rollout.temperature)
    train_epochs(
        policy, buffer, objective, train=train, rollout=rollout, key=key, progress=progress,
        state=state, safe_point=safe_point,
    )  # fmt: skip
    return UpdateStats.of(progress, policy)
