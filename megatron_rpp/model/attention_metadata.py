"""Where the tokens of a forward pass of generation lie in the key-value cache.

Everything that the layers share is computed once, at its first use.

Shape legend: c positions in a block, t tokens of a forward pass, b sequences, m most blocks of a
sequence, p' blocks up to the highest that is owned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_rpp.model import decode_sizes
from megatron_rpp.parallel import device as devices


def block_size() -> int:
    """Positions in a block of the cache."""
    sizes = decode_sizes
    return sizes.CACHE_BLOCK_ON_CPU if devices.ON_CPU else sizes.CACHE_BLOCK_ON_GPU


@dataclass(frozen=True)
class AttentionMetadata:
    """b sequences, each with its next tokens."""

    table: torch.Tensor
    """[b, m] int64: the blocks of each sequence, then any block."""
    positions: torch.Tensor
    """[t] int64: the position of each token in its sequence."""
    attended: int
    """Positions of the longest sequence, with its new tokens; a bound is enough."""
    dtype: torch.dtype
    """Of queries, keys and values."""
    row: torch.Tensor | None = None
    """[t] int64: the sequence of each token; None = one token per sequence."""
    starts: torch.Tensor | None = None
    """[b + 1] int64: the first token of each sequence, then t; None = one token per sequence."""
    most: int = 1
    """Most tokens of a sequence in this pass."""
    owner: torch.Tensor | None = None
    """[p'] int64: the sequence of each block; None = find blocks by `table`."""
    first: torch.Tensor | None = None
    """[p'] int64: the position in its sequence of the first cell of each of those blocks; beyond any
    position if nothing owns the block."""

    @property
    def paged(self) -> bool:
        """Whether PyTorch's kernel for paged caches is used."""
        return self.dtype != torch.float32 and devices.has_paged_attention()

    @cached_property
    def bounds(self) -> torch.Tensor:
        """[b + 1] int32: `starts`."""
        if self.starts is not None:
            return self.starts.int()
        size = len(self.table) + 1
        return torch.arange(size, device=self.table.device, dtype=torch.int32)

    @cached_property
    def pages(self) -> torch.Tensor:
        """[b, m] int32: `table`."""
        return self.table.int()

    @cached_property
    def lengths(self) -> torch.Tensor:
        """[b] int32: positions of each sequence, with its new tokens."""
        last = self.positions if self.starts is None else self.positions[self.starts[1:] - 1]
        return (last + 1).int()

    @cached_property
    def cells(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[t] each: the block of each token's key and value, and its place in that block."""
        size = block_size()
        column = torch.div(self.positions, size, rounding_mode="floor")
        rows = torch.arange(len(self.table), device=column.device) if self.row is None else self.row
        return self.table[rows, column], self.positions % size

    @cached_property
    def block_mask(self) -> torch.Tensor:
        """[p', 1, 1, c], to add to scores within blocks; -inf if nothing owns the block."""
        assert self.owner is not None and self.first is not None
        newest = self.positions[self.owner] - self.first  # counted from the block's first position
        steps = torch.arange(block_size(), device=self.positions.device)
        return self._additive(steps <= newest[:, None])[:, None, None]

    @cached_property
    def token_mask(self) -> torch.Tensor:
        """[b, 1, 1, attended], to add to the scores of one token per sequence."""
        steps = torch.arange(self.attended, device=self.positions.device)
        return self._additive(steps <= self.positions[:, None])[:, None, None]

    @cached_property
    def side_by_side(self) -> torch.Tensor:
        """[t]: the index of each token in [b × most]."""
        assert self.row is not None and self.starts is not None
        steps = torch.arange(len(self.row), device=self.row.device)
        return self.row * self.most + steps - self.starts[self.row]

    @cached_property
    def prompt_mask(self) -> torch.Tensor:
        """[b, 1, most, attended], to add to the scores of prompts side by side."""
        count = len(self.table)
        seen = self.positions.new_zeros(count * self.most)
        seen = seen.index_copy(0, self.side_by_side, self.positions).view(count, self.most, 1)
        steps = torch.arange(self.attended, device=self.positions.device)
        return self._additive(steps <= seen)[:, None]

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(visible, dtype=self.dtype)
        return mask.masked_fill_(~visible, -torch.inf)
