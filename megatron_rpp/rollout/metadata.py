"""Attention metadata of a batch, made on the host and copied to the device without a wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_rpp.model.attention_metadata import AttentionMetadata
from megatron_rpp.parallel import device as devices
from megatron_rpp.rollout.blocks import Blocks


def upload(values: np.ndarray) -> torch.Tensor:
    """Copies an array to this rank's device; the host does not wait."""
    return devices.upload(torch.from_numpy(values), devices.device())


def token_metadata(
    blocks: Blocks,
    sequences: np.ndarray,
    positions: np.ndarray,
    *,
    ahead: int,
    dtype: torch.dtype,
) -> AttentionMetadata:
    """For the next token of each sequence, with rows that pad the batch.

    Args:
        positions: [b], of the next token of each of `sequences` [b].
        ahead: tokens for which the result will be used, with other positions.
    """
    count = len(sequences)
    rows, longest = devices.padded_batch(count), blocks.table.shape[1] * blocks.size
    table = np.full((rows, blocks.table.shape[1]), blocks.total, np.int64)
    table[:count] = blocks.table[sequences]
    padded = np.zeros(rows, np.int64)
    padded[:count] = positions
    attended = min(int(positions.max()) + ahead, longest)
    owner, first = blocks.owners(sequences) if devices.scans_cache() else (None, None)
    return AttentionMetadata(
        table=upload(table),
        positions=upload(padded),
        attended=blocks.count(attended) * blocks.size,
        dtype=dtype,
        owner=None if owner is None else upload(owner),
        first=None if first is None else upload(first),
    )


def prompt_metadata(
    blocks: Blocks,
    sequences: Sequence[int],
    starts: Sequence[int],
    *,
    lengths: Sequence[int],
    dtype: torch.dtype,
) -> AttentionMetadata:
    """For the tokens of prompts, end to end.

    Args:
        starts: position of the first token of each of `sequences`.
        lengths: their tokens.
    """
    count, first = np.array(lengths, np.int64), np.array(starts, np.int64)
    bounds = np.concatenate([[0], np.cumsum(count)])
    row = np.repeat(np.arange(len(count)), count)
    return AttentionMetadata(
        table=upload(blocks.table[list(sequences)]),
        positions=upload(np.arange(bounds[-1]) - bounds[row] + first[row]),
        attended=int((first + count).max()),
        dtype=dtype,
        row=upload(row),
        starts=upload(bounds),
        most=int(count.max()),
    )
