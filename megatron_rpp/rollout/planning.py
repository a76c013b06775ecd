"""Plans which rank owns which samples and which of them form a mini-batch, and divides a mini-batch into micro-batches.

A mini-batch depends on seed, step and epoch, never on the layout. Micro-batches only bound the
memory: they are sorted by length and fit a token budget. Every data-parallel rank has the same
number of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from megatron_rpp.records import MicroBatch
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.rollout.packing import Split, pack
from megatron_rpp.seeds import permutation


def shard(count: int, rank: int, size: int) -> range:
    """The contiguous part of range(count) that `rank` of `size` owns."""
    return range(count * rank // size, count * (rank + 1) // size)


def minibatch_of(
    sample_count: int, minibatches: int, *, seed: int, step: int, epoch: int
) -> torch.Tensor:
    """Returns the mini-batch (0..minibatches-1) of each sample of the whole step, [sample_count]."""
    order = permutation(sample_count, seed, step, epoch)
    number = np.empty(sample_count, dtype=np.int64)
    number[order] = np.arange(sample_count) * minibatches // sample_count
    return torch.from_numpy(number)


def plan(lengths: list[int], samples: list[int], max_tokens: int) -> list[list[int]]:
    """Groups `samples` so that the tokens of each group stay within `max_tokens`.

    The longest come first, so the samples of a group have similar lengths, which saves attention
    padding. A sample that is longer than the budget forms a group of its own.

    Args:
        lengths: tokens of every sample of the buffer, with the padding that a row gives it.
    """
    groups: list[list[int]] = []
    room = 0
    for index in sorted(samples, key=lambda i: (-lengths[i], i)):
        if groups and lengths[index] <= room:
            groups[-1].append(index)
            room -= lengths[index]
        else:
            groups.append([index])
            room = max_tokens - lengths[index]
    return groups


def _plan_together(
    lengths: torch.Tensor, samples: list[int], max_tokens: int, *, together: int
) -> list[list[int]]:
    """As `plan`, with runs of `together` samples as the units that are planned."""
    runs = [samples[i : i + together] for i in range(0, len(samples), together)]
    sizes = [int(lengths[run].sum()) for run in runs]
    planned = plan(sizes, list(range(len(runs))), max_tokens)
    return [[sample for run in group for sample in runs[run]] for group in planned]


def micro_batches(
    buffer: RolloutBuffer,
    samples: list[int],
    max_tokens: int,
    *,
    split: Split,
    device: torch.device,
    agree: Callable[[int], int],
    same_length: bool = False,
    together: int = 1,
    lag: int = 1,
) -> list[MicroBatch]:
    """Makes the micro-batches of `samples`, and adds empty ones up to the number of all ranks.

    Args:
        samples: indices into this replica's buffer; may be empty.
        max_tokens: budget of a micro-batch over the whole row.
        split: how the ranks of the replica divide a row.
        agree: collective; turns this rank's number of micro-batches into the common number of all
            data-parallel ranks.
        same_length: pad all rows to the longest, so that pipeline stages know the shapes of their
            messages.
        together: that many consecutive entries of `samples` stay in one micro-batch.
        lag: see `packing.pack`.
    """
    planned = _plan_together(split.padded(buffer.lengths), samples, max_tokens, together=together)
    planned += [[]] * (agree(len(planned)) - len(planned))
    rows = [
        split.row_length(buffer.lengths[torch.tensor(group, dtype=torch.int64)])
        for group in planned
    ]
    if same_length:
        rows = [max(rows)] * len(rows)
    return [
        pack(buffer, group, split, row_length=row, device=device, lag=lag)
        for group, row in zip(planned, rows)
    ]
