"""Where the tokens of a forward pass lie in the key-value cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_rpp.model.kv_cache import Places
from megatron_rpp.parallel import device as devices
from megatron_rpp.rollout.blocks import Blocks


def upload(values: np.ndarray) -> torch.Tensor:
    """Copies an array to this rank's device; the host does not wait."""
    return devices.upload(torch.from_numpy(values), devices.device())


def token_places(
    blocks: Blocks, sequences: np.ndarray, positions: np.ndarray, *, ahead: int
) -> Places:
    """Where the next token of each sequence lies, with rows that fill up the batch.

    Args:
        positions: [b], of the next token of each of `sequences` [b].
        ahead: tokens for which the result will be used, with other positions.
    """
    count, multiple = len(sequences), devices.row_multiple()
    rows = -(-count // multiple) * multiple
    table = np.full((rows, blocks.table.shape[1]), blocks.total, np.int64)
    table[:count] = blocks.table[sequences]
    filled = np.zeros(rows, np.int64)
    filled[:count] = positions
    attended = int(positions.max()) + ahead
    owner, first = blocks.owners(sequences) if devices.scans_cache() else (None, None)
    return Places(
        table=upload(table),
        positions=upload(filled),
        attended=attended if devices.scans_cache() else blocks.count(attended) * blocks.size,
        owner=None if owner is None else upload(owner),
        first=None if first is None else upload(first),
    )


def prompt_places(
    blocks: Blocks, sequences: Sequence[int], starts: Sequence[int], *, lengths: Sequence[int]
) -> Places:
    """Where the tokens of prompts, end to end, lie.

    Args:
        starts: position of the first token of each of `sequences`.
        lengths: their tokens.
    """
    count, first = np.array(lengths, np.int64), np.array(starts, np.int64)
    bounds = np.concatenate([[0], np.cumsum(count)])
    row = np.repeat(np.arange(len(count)), count)
    return Places(
        table=upload(blocks.table[list(sequences)]),
        positions=upload(np.arange(bounds[-1]) - bounds[row] + first[row]),
        attended=int((first + count).max()),
        row=upload(row),
        starts=upload(bounds),
        most=int(count.max()),
    )
