"""Packs samples of a buffer end to end into one row, and takes this rank's part of it.

Samples are not padded to the longest of the micro-batch, so linear layers run over real tokens.
Context parallelism (c ranks) pads each sequence to a multiple of 2c and distributes its 2c pieces in
a zigzag: rank r holds pieces r and 2c-1-r, so causal attention costs every rank the same.
(TransformerEngine distributes packed rows in the same way.) Padding at the end of the row forms
sequences of its own, at most as long as the longest real one; no response token depends on them.

Shape legend: k sequences, T tokens of the whole row, t = T/c of this rank, n response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rpp.parallel import device as devices
from megatron_rpp.records import MicroBatch, Packing
from megatron_rpp.rollout.buffer import RolloutBuffer


@dataclass(frozen=True)
class Split:
    """How the ranks of a replica divide a row: over context-parallel ranks and, if sequence
    parallelism is on, over the tensor-parallel ranks within each."""

    context: int = 1
    context_rank: int = 0
    tensor: int = 1

    @property
    def sequence_multiple(self) -> int:
        """Every sequence is padded to a multiple of this."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def row_multiple(self) -> int:
        return self.sequence_multiple * self.tensor

    def padded(self, lengths: torch.Tensor) -> torch.Tensor:
        """[k] lengths with the padding of each sequence."""
        multiple = self.sequence_multiple
        return -(-lengths // multiple) * multiple

    def row_length(self, lengths: torch.Tensor) -> int:
        """Tokens of the whole row that holds sequences of `lengths`."""
        tokens = max(int(self.padded(lengths).sum()), 1)
        return -(-tokens // self.row_multiple) * self.row_multiple


def pack(
    buffer: RolloutBuffer,
    samples: list[int],
    split: Split,
    *,
    row_length: int,
    device: torch.device,
    lag: int = 1,
) -> MicroBatch:
    """Packs `samples` into a row and returns this rank's part; no samples give a row of padding.

    Args:
        row_length: T, at least `split.row_length` and a multiple of `split.row_multiple`.
        lag: how many tokens before each response token the hidden state of its row is. 1 = the one
            that predicts the token, 0 = its own.
    """
    index = torch.tensor(samples, dtype=torch.int64)
    lengths, prompts = buffer.lengths[index], buffer.prompt_lengths[index]
    pieces = split.padded(lengths)
    pieces = torch.cat([pieces, _tail(row_length - int(pieces.sum()), pieces, split)])
    starts = torch.nn.functional.pad(pieces.cumsum(0), (1, 0))
    sequence = torch.repeat_interleave(pieces)  # [T] which sequence a token of the row is of
    position = torch.arange(row_length) - starts[sequence]

    within = torch.repeat_interleave(lengths)  # [sum of lengths] sample of each real token
    step = torch.arange(len(within)) - torch.nn.functional.pad(lengths.cumsum(0), (1, 0))[within]
    place = starts[within] + step
    tokens = torch.zeros(row_length, dtype=torch.int64)
    tokens[place] = buffer.tokens[buffer.offsets[index][within] + step]

    answered = step >= prompts[within]
    column = (buffer.response_offsets[index] - prompts)[within[answered]] + step[answered]
    before = place[answered] - lag
    held = zigzag(pieces, split.context)  # [c, t]
    own = held[split.context_rank]
    local = torch.full((row_length,), -1)
    local[own] = torch.arange(len(own))
    here = local[before] >= 0
    return MicroBatch(
        tokens=devices.upload(tokens[own][None], device),
        positions=devices.upload(position[own], device),
        packing=_packing(
            pieces,
            starts,
            sequence=sequence,
            position=position,
            held=held,
            rank=split.context_rank,
            device=device,
        ),
        rows=devices.upload(local[before][here], device),
        targets=devices.upload(tokens[place[answered]][here], device),
        column=column[here],
    )


def zigzag(pieces: torch.Tensor, context: int) -> torch.Tensor:
    """[context, T/context] the tokens that each context-parallel rank holds, in its order.

    pieces: [k] lengths of the row's sequences, multiples of 2·context where context > 1.
    """
    starts = pieces.cumsum(0) - pieces
    if context == 1:
        return torch.arange(int(pieces.sum()))[None]
    size = pieces // (2 * context)
    ranks = []
    for rank in range(context):
        held = torch.stack([starts + rank * size, starts + (2 * context - 1 - rank) * size], 1)
        first, count = held.flatten(), size.repeat_interleave(2)
        which = torch.repeat_interleave(count)
        ranks.append(first[which] + torch.arange(len(which)) - (count.cumsum(0) - count)[which])
    return torch.stack(ranks)


def _tail(missing: int, pieces: torch.Tensor, split: Split) -> torch.Tensor:
    """Lengths of the padding sequences that fill a row up by `missing` tokens."""
    largest = int(pieces.max()) if len(pieces) else split.row_multiple
    full, rest = divmod(missing, largest)
    return torch.tensor([largest] * full + [rest] * (rest > 0), dtype=torch.int64)


def _packing(
    pieces: torch.Tensor,
    starts: torch.Tensor,
    *,
    sequence: torch.Tensor,
    position: torch.Tensor,
    held: torch.Tensor,
    rank: int,
    device: torch.device,
) -> Packing:
    context, longest = len(held), int(pieces.max())
    key_cells = sequence * longest + position
    arguments = {"boundaries": starts.int(), "key_cells": key_cells, "query_cells": key_cells}
    if context > 1:
        own = held[rank]
        counts = pieces // context
        step = torch.arange(len(own)) - (counts.cumsum(0) - counts)[sequence[own]]
        query_cells = sequence[own] * (longest // context) + step
        gathered = torch.empty(len(sequence), dtype=torch.int64)
        gathered[held.flatten()] = torch.arange(len(sequence))
        asked = torch.zeros(len(pieces) * (longest // context), dtype=torch.int64)
        asked[query_cells] = position[own]
        visible = torch.arange(longest) <= asked.view(len(pieces), 1, -1, 1)
        arguments |= {"query_cells": query_cells, "gathered": gathered, "visible": visible}
    uploaded = {name: devices.upload(values, device) for name, values in arguments.items()}
    return Packing(longest=longest, **uploaded)
