"""The policy update: epochs of mini-batches over one rollout batch, one optimizer step each.

The loss of a mini-batch is a global mean: micro-batches and data-parallel ranks add up numerators
and counts, and Megatron divides the summed gradient once (`calculate_per_token_loss`). So neither
the number of ranks nor the micro-batch size can change it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist

from megatron_rpp.algorithms import aggregation_weights, kl_estimate, policy_loss, policy_stats
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config import AlgorithmConfig, TrainConfig
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model import pipeline
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.records import MicroBatch
from megatron_rpp.rollout import planning
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.stages import nonfinite
from megatron_rpp.stages.logprobs import make_micro_batches, token_logprobs


@dataclass(frozen=True)
class UpdateStats:
    """Means over all tokens of the step's mini-batches (loss: over mini-batches), but for those
    whose update was skipped; all 0 where every one was."""

    loss: float
    clip_fraction: float
    approx_kl: float
    entropy: float
    ratio_max: float
    grad_norm: float
    learning_rate: float
    faults: list[str]
    """Why updates were skipped, one text each."""


def _loss(model, buffer: RolloutBuffer, algorithm: AlgorithmConfig, temperature: float):
    """The loss function of a mini-batch for `pipeline.train`."""
    clip = (algorithm.clip_low, algorithm.clip_high)
    weights, counts = (
        buffer.flat(values)
        for values in aggregation_weights(buffer.padded(buffer.mask), algorithm.aggregation)
    )

    def loss(batch: MicroBatch, hidden: torch.Tensor):
        def column(values: torch.Tensor) -> torch.Tensor:
            """[1, n]: a response may be split over ranks, so tokens stand for themselves."""
            return values[batch.column].to(hidden.device)[None]

        logprobs, entropy = token_logprobs(model, batch, hidden, temperature, True)
        logprobs, entropy = logprobs[None], entropy[None]
        old, advantages, mask = (
            column(values) for values in (buffer.old_logprobs, buffer.advantages, buffer.mask)
        )
        per_token = policy_loss(logprobs, old, advantages, *clip, algorithm.dual_clip)
        if buffer.rollout_weights is not None:
            per_token = per_token * column(buffer.rollout_weights)
        if algorithm.entropy_coef:
            per_token = per_token - algorithm.entropy_coef * entropy
        if algorithm.kl_loss_coef:
            kl = kl_estimate(logprobs, column(buffer.ref_logprobs), "k2")
            per_token = per_token + algorithm.kl_loss_coef * kl
        total = (torch.where(mask, per_token, 0.0) * column(weights).to(per_token)).sum()
        count = column(counts).sum()
        stats = policy_stats(logprobs.detach(), old, advantages, mask, *clip)
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
    """How far an update has come, and what its mini-batches reported; JSON values."""

    done: int = 0
    """Mini-batches, over all epochs."""
    rows: list[list[float]] = field(default_factory=list)
    """Of `_reduce`, a row for each that was not skipped."""
    norms: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def run(
    policy: torch.nn.Module,
    optimizer,
    scheduler,
    buffer: RolloutBuffer,
    algorithm: AlgorithmConfig,
    train: TrainConfig,
    temperature: float,
    sample_count: int,
    seed: int,
    state: RunState,
    progress: UpdateProgress,
    safe_point: Callable[[], None],
) -> UpdateStats:
    """Updates `policy` on the step's rollouts; the same on every layout of ranks.

    Args:
        policy: its chunks, DDP-wrapped. buffer: this replica's shard, with old_logprobs, advantages
            and, where a KL loss is on, ref_logprobs. temperature: of the rollout. sample_count:
            samples of the whole step over all replicas. state: of the run; counts skipped updates.
        progress: where to begin, and kept up to date. safe_point: called before each mini-batch,
            when policy, optimizer and `progress` are at one point; may raise to end the update.

    Raises RunFailure where too many updates in a row were skipped (nonfinite.py).
    """
    loss = _loss(policy, buffer, algorithm, temperature)
    for position in range(progress.done, train.epochs * train.minibatches):
        safe_point()
        heartbeat.enter("update")
        epoch, minibatch = divmod(position, train.minibatches)
        number = planning.minibatch_of(sample_count, train.minibatches, seed, state.step, epoch)
        samples = (number[buffer.sample_ids] == minibatch).nonzero().squeeze(1).tolist()
        batches = make_micro_batches(policy, buffer, samples, train.max_tokens_per_microbatch)
        done = optimizer_step(policy, optimizer, scheduler, batches, loss)
        nonfinite.count(state, done.fault, train.max_skipped_updates)
        if done.fault is None:
            progress.rows.append(_reduce(done.reports, minibatch))
            progress.norms.append(done.grad_norm)
        else:
            progress.faults.append(f"mini-batch {minibatch} of epoch {epoch}: {done.fault}")
        progress.done += 1
    return _stats(progress, optimizer.param_groups[0]["lr"])


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
        faults=progress.faults,
    )


class Done(NamedTuple):
    """One step of the optimizer, or why there was none."""

    reports: list[torch.Tensor]
    """Of the loss function, on the last stage."""
    grad_norm: float
    """Global norm before clipping; 0 where the step was skipped."""
    fault: str | None
    """Why it was skipped; None where it was not."""


def optimizer_step(policy, optimizer, scheduler, batches, loss) -> Done:
    """Gradient of `loss` over `batches` and one step of the optimizer and its schedule.

    Where a loss or gradient of any rank is not finite, all ranks skip the step. Collective.
    """
    for chunk in policy:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    backward = pipeline.train(policy, batches, loss)
    fault = nonfinite.fault(backward)
    if fault is not None:
        return Done(backward.reports, 0.0, fault)
    # Every rank's gradient is finite; their sum may not be, and clipping would make it 0 or NaN.
    optimizer.prepare_grads()
    if not math.isfinite(optimizer.get_grad_norm()):
        fault = "the norm of all ranks' gradients together is NaN or infinite"
        return Done(backward.reports, 0.0, fault)
    _, grad_norm, _ = optimizer.step()
    scheduler.step(increment=1)
    return Done(backward.reports, float(grad_norm), None)
