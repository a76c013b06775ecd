"""Training and evaluation of a reward model: one number for each response, read at its last token.

The loss of a step is a mean over the rows of the whole batch: sums and counts are added up over
micro-batches and data-parallel ranks (stages/update.py). A pair stays in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_rpp.algorithms import bradley_terry_loss, correlation, squared_error
from megatron_rpp.data.pair_files import RatedPrompt
from megatron_rpp.data.pairs import Content
from megatron_rpp.data.prompts import Prompt
from megatron_rpp.model import pipeline
from megatron_rpp.model.scalar_model import scalars
from megatron_rpp.model.sequence_scores import sequence_scores
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.records import Generation, MicroBatch, Request
from megatron_rpp.rollout.buffer import RolloutBuffer, from_generations
from megatron_rpp.rollout.engine import Abandoned
from megatron_rpp.rollout.planning import shard
from megatron_rpp.stages.logprobs import make_micro_batches, response_column


class Batch(NamedTuple):
    """Rows of this replica."""

    buffer: RolloutBuffer
    """The sequences of all rows, those of a row side by side; each has one response token, its last."""
    targets: torch.Tensor
    """fp32, per row: the margin of the pair, or the score."""
    sides: int
    """Sequences per row: 2 in pairs, 1 with scores."""

    def micro_batches(self, model: torch.nn.ModuleList, max_tokens: int) -> list[MicroBatch]:
        """All rows; the same number on every data-parallel rank. Collective."""
        samples = list(range(len(self.buffer)))
        return make_micro_batches(
            model, self.buffer, samples, max_tokens=max_tokens, together=self.sides, lag=0
        )


class RowStats(NamedTuple):
    """What rows are measured by, fp32 [n] each; `correct` and `margin` are 0 with scores."""

    loss: torch.Tensor
    correct: torch.Tensor
    """1 where the better response has the higher reward."""
    margin: torch.Tensor
    """Reward of the better response - reward of the worse one."""


def batch_of(prompts: Sequence[Prompt], content: Content) -> Batch:
    """The batch of rows of a data set of a reward model."""
    rows: list[Prompt] = []
    targets: list[float] = []
    sequences: list[tuple[int, ...]] = []
    for prompt in prompts:
        assert isinstance(prompt, RatedPrompt)
        targets.append(prompt.example.target)
        rows += [prompt] * len(prompt.sequences)
        sequences += prompt.sequences
    sides = 2 if content == "pairs" else 1
    buffer = sequence_buffer(rows, sequences, sides)
    return Batch(buffer, torch.tensor(targets, dtype=torch.float32), sides)


def sequence_buffer(
    prompts: list[Prompt], sequences: Sequence[tuple[int, ...]], together: int = 1
) -> RolloutBuffer:
    """A buffer of token sequences, each with one response token, its last.

    prompts: that of each sequence. together: sequences of one prompt, side by side.
    """
    requests = [Request(sequence[:-1], number) for number, sequence in enumerate(sequences)]
    ends = [Generation([sequence[-1]], [0.0], False) for sequence in sequences]
    return from_generations(prompts, requests, ends, samples_per_prompt=together)


def row_stats(rewards: torch.Tensor, targets: torch.Tensor, sides: int) -> RowStats:
    """The losses of n rows, from the rewards [n x sides] of their sequences; targets: [n]."""
    if sides == 1:
        none = torch.zeros_like(rewards)
        return RowStats(squared_error(rewards, targets), none, none)
    better, worse = rewards.view(len(targets), 2).unbind(1)
    loss = bradley_terry_loss(better, worse, targets)
    return RowStats(loss, (better > worse).to(loss), better - worse)


def rating_loss(model: torch.nn.ModuleList, batch: Batch) -> pipeline.LossFunction:
    """The loss function of a batch for `pipeline.train`; reports sums of (loss, 1, correct, margin)."""
    counting = groups.context_group().rank() == 0  # all context-parallel ranks have the same rows

    def loss(
        micro_batch: MicroBatch, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rewards, present = sequence_scores(model, micro_batch, hidden, count=len(batch.buffer))
        here = present.view(len(batch.targets), batch.sides)[:, 0]
        stats = row_stats(rewards, devices.upload(batch.targets, hidden.device), batch.sides)
        total = torch.where(here, stats.loss, 0.0).sum()
        counted = here & counting
        ones = torch.ones_like(stats.loss)
        columns = torch.stack([stats.loss, ones, stats.correct, stats.margin]).detach().double()
        return total, counted.sum().int(), torch.where(counted, columns, 0.0).sum(1)

    return loss


def mean_report(reports: list[torch.Tensor]) -> list[float]:
    """Means of (loss, correct, margin) over the rows of all micro-batches and replicas. Collective."""
    empty = torch.zeros(4, dtype=torch.float64, device=devices.device())
    sums = torch.stack([empty, *reports]).sum(0)
    dist.all_reduce(sums, group=groups.token_group())
    loss, count, correct, margin = groups.broadcast_from_last_stage(sums).tolist()
    return [loss / count, correct / count, margin / count]


def rewards_of(model: torch.nn.ModuleList, buffer: RolloutBuffer, max_tokens: int) -> torch.Tensor:
    """The rewards of the sequences of a `sequence_buffer`, fp32 [n], on the host. Collective."""

    def head(micro_batch: MicroBatch, hidden: torch.Tensor) -> torch.Tensor:
        return scalars(model, hidden, micro_batch.rows)

    return response_column(model, buffer, head, max_tokens=max_tokens, lag=0)


def evaluate(
    model: torch.nn.ModuleList,
    prompts: Sequence[Prompt],
    content: Content,
    *,
    batch_size: int,
    max_tokens: int,
    stop: Callable[[], bool],
) -> dict[str, float]:
    """The metrics of held-out rows, the same on any layout. Collective.

    Pairs: loss, accuracy (share of pairs whose better response has the higher reward) and mean margin;
    scores: loss and correlation.

    Args:
        batch_size: rows at a time, over all replicas; `stop` is asked before each batch.
        stop: whether the run was told to stop; the answers of the ranks may differ.
    Raises:
        Abandoned: on every rank, if the run was told to stop.
    """
    rewards: list[float] = []
    targets: list[float] = []
    for start in range(0, len(prompts), batch_size):
        if groups.on_any(stop()):
            raise Abandoned
        count = min(batch_size, len(prompts) - start)
        own = shard(count, groups.data_rank(), groups.data_size())
        batch = batch_of([prompts[start + i] for i in own], content)
        found = rewards_of(model, batch.buffer, max_tokens).tolist()
        for more_rewards, more_targets in groups.gather_objects(
            (found, batch.targets.tolist()), groups.data_group()
        ):
            rewards += more_rewards
            targets += more_targets
    wanted = torch.tensor(targets, dtype=torch.float64)
    given = torch.tensor(rewards, dtype=torch.float64)
    stats = row_stats(given, wanted, len(given) // len(wanted))
    row = {"eval/loss": float(stats.loss.mean())}
    if content == "scores":
        return row | {"eval/correlation": correlation(given, wanted)}
    accuracy, margin = float(stats.correct.mean()), float(stats.margin.mean())
    return row | {"eval/accuracy": accuracy, "eval/margin_mean": margin}
