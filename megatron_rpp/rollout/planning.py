"""Which samples form a mini-batch, and how a mini-batch is cut into micro-batches.

A mini-batch depends on the seed and the step, never on the layout. Micro-batches are a matter of
memory alone: length-sorted, within a token budget, as many on every data-parallel rank.
"""

from __future__ import annotations

from typing import Callable

import numpy as np
import torch

from megatron_rpp.records import MicroBatch
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.seeds import permutation


def minibatch_of(
    sample_count: int, minibatches: int, seed: int, step: int, epoch: int
) -> torch.Tensor:
    """[sample_count] the mini-batch, 0..minibatches-1, of each sample of the whole step."""
    order = permutation(sample_count, seed, step, epoch)
    number = np.empty(sample_count, dtype=np.int64)
    number[order] = np.arange(sample_count) * minibatches // sample_count
    return torch.from_numpy(number)


def plan(lengths: list[int], samples: list[int], max_tokens: int) -> list[list[int]]:
    """Groups `samples` so that (samples × longest) stays within `max_tokens`.

    Longest first, so neighbours are of like length and little is padding. A sample longer than
    the budget travels alone.
    """
    groups: list[list[int]] = []
    for index in sorted(samples, key=lambda i: (-lengths[i], i)):
        fits = groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens
        if fits:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def micro_batches(
    buffer: RolloutBuffer,
    samples: list[int],
    max_tokens: int,
    multiple: int,
    device: torch.device,
    agree: Callable[[int], int],
) -> list[MicroBatch]:
    """The micro-batches of `samples`, filled up with empty ones to the agreed count.

    Args:
        samples: indices into this replica's buffer; may be none.
        max_tokens: budget of a micro-batch, padding included.
        multiple: sequence lengths are padded to it (tensor-parallel size, sequence parallelism).
        agree: this rank's count of micro-batches -> the largest count over data-parallel ranks.
    """
    planned = plan(buffer.lengths.tolist(), samples, max_tokens)
    planned += [[]] * (agree(len(planned)) - len(planned))
    return [buffer.micro_batch(group, multiple, device) for group in planned]
