"""What the updates of policy and critic share: epochs of mini-batches, one optimizer step each.

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

from megatron_rpp.algorithms import aggregation_weights
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config import RolloutConfig, TrainConfig
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model import overlap, pipeline
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.records import MicroBatch, StepKey
from megatron_rpp.rollout import planning
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.stages import nonfinite
from megatron_rpp.stages.logprobs import make_micro_batches


@dataclass
class UpdateProgress:
    """The progress of an update and the reports of its mini-batches, as JSON values."""

    done: int = 0
    """Finished mini-batches, over all epochs."""
    rows: list[list[float]] = field(default_factory=list)
    """The report of each mini-batch whose update was not skipped, over all ranks (Objective)."""
    norms: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Why updates were skipped. Checkpoints hold these fields by their names."""

    @property
    def loss(self) -> float:
        """Mean over the mini-batches; 0 if there is none."""
        return sum(row[0] / row[1] for row in self.rows) / max(1, len(self.rows))

    @property
    def grad_norm(self) -> float:
        """Mean over the mini-batches, before clipping; 0 if there is none."""
        return sum(self.norms) / max(1, len(self.rows))

    def per_token(self, column: int) -> float:
        """Sum of a column of the reports, divided by the number of tokens."""
        tokens = sum(row[2] for row in self.rows)
        return sum(row[column] for row in self.rows) / max(1, tokens)


class TokenSums:
    """Sums over the tokens of a micro-batch, weighted as algorithm.aggregation says."""

    def __init__(self, buffer: RolloutBuffer, aggregation: str) -> None:
        self.mask = buffer.mask
        self.weights, self.counts = (
            buffer.flat(values)
            for values in aggregation_weights(buffer.padded(buffer.mask), aggregation)
        )

    def loss(self, batch: MicroBatch, per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the losses [1, n], count) of the mini-batch mean, from this micro-batch."""
        mask, weights, counts = (
            column(values, batch, per_token) for values in (self.mask, self.weights, self.counts)
        )
        return (torch.where(mask, per_token, 0.0) * weights.to(per_token)).sum(), counts.sum()


def column(values: torch.Tensor, batch: MicroBatch, like: torch.Tensor) -> torch.Tensor:
    """[1, n], the values of a buffer's response column at a micro-batch's tokens, where `like` is.

    A response may be split over ranks, so each token counts for itself.
    """
    return devices.upload(values[batch.column], like.device)[None]


@dataclass(frozen=True)
class Objective:
    """A loss to minimise, and what its function reports of a micro-batch."""

    loss: pipeline.LossFunction
    phase: str
    """Name of its updates in the signs of life."""
    sums: int
    """The report begins with this many sums: of losses, the count, of tokens, then others."""
    peaks: int = 0
    """Then this many values follow of which the largest counts."""
    counter: nonfinite.Counter = "skipped_in_a_row"
    """Where RunState counts its skipped updates."""

    def reduce(self, reports: list[torch.Tensor], minibatch: int) -> list[float]:
        """The report of a mini-batch over its micro-batches and replicas, on every rank."""
        width = self.sums + self.peaks
        empty = torch.zeros(width, dtype=torch.float64, device=devices.device())
        stacked = torch.stack([empty, *reports])
        sums, peaks = stacked[:, : self.sums].sum(0), stacked[:, self.sums :].amax(0)
        dist.all_reduce(sums, group=groups.token_group())
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=groups.token_group())
        values = groups.broadcast_from_last_stage(torch.cat([sums, peaks])).tolist()
        assert values[1] > 0, f"mini-batch {minibatch} has no response token on any rank"
        return values


def train_epochs(
    trained: TrainedModel,
    buffer: RolloutBuffer,
    objective: Objective,
    *,
    train: TrainConfig,
    rollout: RolloutConfig,
    key: StepKey,
    progress: UpdateProgress,
    state: RunState,
    safe_point: Callable[[], None],
) -> None:
    """Takes the steps of the optimizer over the rollouts of a step, with the same result on any
    layout. Collective.

    Args:
        buffer: this replica's shard, with the columns that the objective reads.
        progress: where to start; updated after each mini-batch.
        state: counts the skipped updates; too many in a row raise RunFailure (nonfinite.py).
        safe_point: called before each mini-batch, when model, optimizer and `progress` are
            consistent; it may raise to end the update.
    """
    for position in range(progress.done, train.epochs * train.minibatches):
        safe_point()
        heartbeat.enter(objective.phase)
        epoch, minibatch = divmod(position, train.minibatches)
        number = planning.minibatch_of(
            rollout.samples_per_step, train.minibatches, seed=key.seed, step=key.step, epoch=epoch
        )
        samples = (number[buffer.sample_ids] == minibatch).nonzero().squeeze(1).tolist()
        batches = make_micro_batches(
            trained.model, buffer, samples, max_tokens=train.max_tokens_per_microbatch
        )
        done = optimizer_step(trained, batches, objective.loss)
        nonfinite.count_skipped(
            state, done.skip_reason, train.max_skipped_updates, counter=objective.counter
        )
        if done.skip_reason is None:
            progress.rows.append(objective.reduce(done.reports, minibatch))
            progress.norms.append(done.grad_norm)
        else:
            progress.faults.append(f"mini-batch {minibatch} of epoch {epoch}: {done.skip_reason}")
        progress.done += 1
    overlap.complete_weights(trained.model)


class OptimizerStep(NamedTuple):
    """What one step of the optimizer did, or why it was skipped."""

    reports: list[torch.Tensor]
    """What the loss function reported, on the last pipeline stage."""
    grad_norm: float
    """Global norm before clipping; 0 if the step was skipped."""
    skip_reason: str | None
    """None if the step was not skipped."""


def optimizer_step(
    trained: TrainedModel, batches: list[MicroBatch], loss: pipeline.LossFunction
) -> OptimizerStep:
    """Computes the gradient of `loss` over `batches` and steps optimizer and schedule. Collective.

    If a loss or gradient of any rank is not finite, all ranks skip the step. The next one may follow
    at once; any other reader of the weights, after `overlap.complete_weights`.
    """
    optimizer = trained.optimizer
    for chunk in trained.model:
        chunk.zero_grad_buffer()  # type: ignore[operator]  # a method of Megatron's DDP
    optimizer.zero_grad()
    backward = pipeline.train(trained.model, batches, loss)
    reason = nonfinite.skip_reason(backward)
    if reason is not None:
        return OptimizerStep(backward.reports, 0.0, reason)
    # Every rank's gradient is finite; their sum may not be, and clipping would make it 0 or NaN.
    optimizer.prepare_grads()
    if not math.isfinite(optimizer.get_grad_norm()):
        reason = "the norm of all ranks' gradients together is NaN or infinite"
        return OptimizerStep(backward.reports, 0.0, reason)
    _, grad_norm, _ = optimizer.step()
    trained.scheduler.step(increment=1)
    return OptimizerStep(backward.reports, float(grad_norm), None)
