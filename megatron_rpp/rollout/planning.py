"""Which samples form a mini-batch, and how a mini-batch is cut into micro-batches.

A mini-batch depends on the seed and the step, never on the layout. Micro-batches are a matter of
memory alone: length-sorted, within a token budget, as many on every data-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from megatron_rpp.records import MicroBatch
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.rollout.packing import Split, pack
from megatron_rpp.seeds import permutation


def minibatch_of(
    sample_count: int, minibatches: int, *, seed: int, step: int, epoch: int
) -> torch.Tensor:
    """[sample_count] the mini-batch, 0..minibatches-1, of each sample of the whole step."""
    order = permutation(sample_count, seed, step, epoch)
    number = np.empty(sample_count, dtype=np.int64)
    number[order] = np.arange(sample_count) * minibatches // sample_count
    return torch.from_numpy(number)


def plan(lengths: list[int], samples: list[int], max_tokens: int) -> list[list[int]]:
    """Groups `samples` so that the tokens of each group stay within `max_tokens`.

    Longest first, so neighbours are of like length: attention works on them side by side. A sample
    longer than the budget travels alone.

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


def micro_batches(
    buffer: RolloutBuffer,
    samples: list[int],
    max_tokens: int,
    *,
    split: Split,
    device: torch.device,
    agree: Callable[[int], int],
    same_length: bool = False,
) -> list[MicroBatch]:
    """The micro-batches of `samples`, filled up with empty ones to the agreed count.

    Args:
        samples: indices into this replica's buffer; may be none.
        max_tokens: budget of a micro-batch over the whole row.
        split: how the ranks of the replica cut a row.
        agree: this rank's count of micro-batches -> the count on every data-parallel rank.
        same_length: pad all rows to the longest (interleaved pipeline stages want one shape).
    """
    planned = plan(split.padded(buffer.lengths).tolist(), samples, max_tokens)
    planned += [[]] * (agree(len(planned)) - len(planned))
    rows = [split.row_length(buffer.lengths[torch.tensor(group, dtype=torch.int64)]) for group in planned]
    if same_length:
        rows = [max(rows)] * len(rows)
    return [pack(buffer, group, split, row, device) for group, row in zip(planned, rows)]
