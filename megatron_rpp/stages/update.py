"""Stage 5, update: epochs of mini-batches over the rollouts of a step, one optimizer step each.

The loss of a mini-batch is a global mean: numerators and counts are summed over micro-batches and
data-parallel ranks, and Megatron divides the summed gradient once (`calculate_per_token_loss`). So
the loss depends neither on the number of ranks nor on the size of the micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_rpp.algorithms import aggregation_weights, kl_estimate, policy_loss, policy_stats
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config import AlgorithmConfig, RolloutConfig, TrainConfig
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model import overlap, pipeline
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.records import MicroBatch, StepKey
from megatron_rpp.rollout import planning
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.stages import nonfinite
from megatron_rpp.stages.logprobs import make_micro_batches, token_logprobs


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


def _loss(
    model: torch.nn.ModuleList,
    buffer: RolloutBuffer,
    algorithm: AlgorithmConfig,
    *,
    temperature: float,
) -> pipeline.LossFunction:
    """The loss function of a mini-batch for `pipeline.train`."""
    weights, counts = (
        buffer.flat(values)
        for values in aggregation_weights(buffer.padded(buffer.mask), algorithm.aggregation)
    )

    def loss(
        batch: MicroBatch, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        def column(values: torch.Tensor) -> torch.Tensor:
            """[1, n]: a response may be split over ranks, so each token counts for itself."""
            return devices.upload(values[batch.column], hidden.device)[None]

        logprobs, entropy = token_logprobs(
            model, batch, hidden, temperature=temperature, with_entropy=True
        )
        assert entropy is not None
        assert buffer.old_logprobs is not None and buffer.advantages is not None
        logprobs, entropy = logprobs[None], entropy[None]
        old, advantages, mask = (
            column(values) for values in (buffer.old_logprobs, buffer.advantages, buffer.mask)
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
            per_token = per_token * column(buffer.rollout_weights)
        if algorithm.entropy_coef:
            per_token = per_token - algorithm.entropy_coef * entropy
        if algorithm.kl_loss_coef:
            assert buffer.ref_logprobs is not None
            kl = kl_estimate(logprobs, column(buffer.ref_logprobs), "k2")
            per_token = per_token + algorithm.kl_loss_coef * kl
        total = (torch.where(mask, per_token, 0.0) * column(weights).to(per_token)).sum()
        count = column(counts).sum()
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

    return loss


def _reduce(reports: list[torch.Tensor], minibatch: int) -> list[float]:
    """A mini-batch's report over its micro-batches and replicas, on every rank.

    [loss sum, count, tokens, clipped, approx_kl, entropy, largest ratio].
    """
    empty = torch.zeros(7, dtype=torch.float64, device=devices.device())
    stacked = torch.stack([empty, *reports])
    sums, peak = stacked[:, :6].sum(0), stacked[:, 6:].amax(0)
    dist.all_reduce(sums, group=groups.token_group())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=groups.token_group())
    values = groups.broadcast_from_last_stage(torch.cat([sums, peak])).tolist()
    assert values[1] > 0, f"mini-batch {minibatch} has no response token on any rank"
    return values


@dataclass
class UpdateProgress:
    """The progress of an update and the reports of its mini-batches, as JSON values."""

    done: int = 0
    """Finished mini-batches, over all epochs."""
    rows: list[list[float]] = field(default_factory=list)
    """What `_reduce` returned, for each mini-batch whose update was not skipped."""
    norms: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Why updates were skipped. Checkpoints hold these fields by their names."""


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
        progress: where to start; updated after each mini-batch.
        safe_point: called before each mini-batch, when policy, optimizer and `progress` are
            consistent; it may raise to end the update.
    Raises:
        RunFailure: too many updates in a row were skipped (nonfinite.py).
    """
    loss = _loss(policy.model, buffer, algorithm, temperature=rollout.temperature)
    for position in range(progress.done, train.epochs * train.minibatches):
        safe_point()
        heartbeat.enter("update")
        epoch, minibatch = divmod(position, train.minibatches)
        number = planning.minibatch_of(
            rollout.samples_per_step, train.minibatches, seed=key.seed, step=key.step, epoch=epoch
        )
        samples = (number[buffer.sample_ids] == minibatch).nonzero().squeeze(1).tolist()
        batches = make_micro_batches(
            policy.model, buffer, samples, max_tokens=train.max_tokens_per_microbatch
        )
        done = optimizer_step(policy, batches, loss)
        nonfinite.count_skipped(state, done.skip_reason, train.max_skipped_updates)
        if done.skip_reason is None:
            progress.rows.append(_reduce(done.reports, minibatch))
            progress.norms.append(done.grad_norm)
        else:
            progress.faults.append(f"mini-batch {minibatch} of epoch {epoch}: {done.skip_reason}")
        progress.done += 1
    overlap.complete_weights(policy.model)
    return _stats(progress, policy.optimizer.param_groups[0]["lr"])


def _stats(progress: UpdateProgress, learning_rate: float) -> UpdateStats:
    rows, norms = progress.rows, progress.norms
    tokens, updates = max(1, sum(row[2] for row in rows)), max(1, len(rows))
    return UpdateStats(
        loss=sum(row[0] / row[1] for row in rows) / updates,
        clip_fraction=sum(row[3] for row in rows) / tokens,
        approx_kl=sum(row[4] for row in rows) / tokens,
        entropy=sum(row[5] for row in rows) / tokens,
        ratio_max=max((row[6] for row in rows), default=0.0),
        grad_norm=sum(norms) / updates,
        learning_rate=learning_rate,
        skip_reasons=progress.faults,
    )


class OptimizerStep(NamedTuple):
    """What one step of the optimizer did, or why it was skipped."""

    reports: list[torch.Tensor]
    """What the loss function reported, on the last pipeline stage."""
    grad_norm: float
    """Global norm before clipping; 0 if the step was skipped."""
    skip_reason: str | None
    """None if the step was not skipped."""


def optimizer_step(
    policy: TrainedModel, batches: list[MicroBatch], loss: pipeline.LossFunction
) -> OptimizerStep:
    """Computes the gradient of `loss` over `batches` and steps optimizer and schedule. Collective.

    If a loss or gradient of any rank is not finite, all ranks skip the step. The next one may follow
    at once; any other reader of the weights, after `overlap.complete_weights`.
    """
    optimizer = policy.optimizer
    for chunk in policy.model:
        chunk.zero_grad_buffer()  # type: ignore[operator]  # a method of Megatron's DDP
    optimizer.zero_grad()
    backward = pipeline.train(policy.model, batches, loss)
    reason = nonfinite.skip_reason(backward)
    if reason is not None:
        return OptimizerStep(backward.reports, 0.0, reason)
    # Every rank's gradient is finite; their sum may not be, and clipping would make it 0 or NaN.
    optimizer.prepare_grads()
    if not math.isfinite(optimizer.get_grad_norm()):
        reason = "the norm of all ranks' gradients together is NaN or infinite"
        return OptimizerStep(backward.reports, 0.0, reason)
    _, grad_norm, _ = optimizer.step()
    policy.scheduler.step(increment=1)
    return OptimizerStep(backward.reports, float(grad_norm), None)
