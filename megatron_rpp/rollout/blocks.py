"""Which blocks of the key-value cache each sequence owns, on the host."""

from __future__ import annotations

import heapq

import numpy as np

from megatron_rpp.model import attention_metadata

FULL_SHARE = 0.8
"""Gaps between blocks are closed if less than this share of the blocks up to the highest is owned."""
NOWHERE = 2**40
"""The first position of a block that nothing owns."""


def blocks_of(positions: int) -> int:
    """Blocks that hold this many positions of a sequence."""
    return -(-positions // attention_metadata.block_size())


class Blocks:
    """Which blocks each sequence owns. The lowest free block is always taken first."""

    def __init__(self, sequences: int, blocks: int, longest: int):
        """
        Args:
            sequences: sequences over time, numbered from 0.
            blocks: blocks of the cache.
            longest: most positions of a sequence.
        """
        self.size = attention_metadata.block_size()
        self.total = blocks
        self.highest = 0
        """One more than the highest block that has ever been owned."""
        self.table = np.full((sequences, self.count(longest)), blocks)  # that block is nobody's
        self.owned = np.zeros(sequences, np.int64)
        self._owner = np.full(blocks, -1)  # of each block: a sequence
        self._column = np.zeros(blocks, np.int64)  # and its place in the table
        self._free = list(range(blocks))

    @classmethod
    def within(cls, positions: int | None, *, sequences: int, at_once: int, longest: int) -> Blocks:
        """As many blocks as `at_once` sequences of `longest` positions need. They hold no more than
        `positions` (None = any number), unless a single sequence needs more."""
        one = blocks_of(longest)
        total = one * at_once
        if positions is not None:
            total = max(one, min(total, positions // attention_metadata.block_size()))
        return cls(sequences, total, longest)

    def count(self, positions: int) -> int:
        """Blocks that hold this many positions."""
        return blocks_of(positions)

    @property
    def free(self) -> int:
        return len(self._free)

    def lacking(self, sequences: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Blocks that each of `sequences` needs besides its own to hold `positions`."""
        return np.maximum(-(-positions // self.size) - self.owned[sequences], 0)

    def grow(self, sequence: int, count: int) -> np.ndarray:
        """Gives `count` more blocks to a sequence; returns its blocks."""
        first = self.owned[sequence]
        for column in range(first, first + count):
            block = heapq.heappop(self._free)
            self.table[sequence, column] = block
            self._owner[block], self._column[block] = sequence, column
            self.highest = max(self.highest, block + 1)
        self.owned[sequence] += count
        return self.table[sequence, : first + count]

    def owners(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AttentionMetadata.owner and AttentionMetadata.first of a batch of `sequences`."""
        table, owned = self.table[sequences], self.owned[sequences]
        row = np.repeat(np.arange(len(sequences)), owned)
        column = np.arange(len(row)) - np.repeat(np.cumsum(owned) - owned, owned)
        block = table[row, column]
        owner = np.zeros(block.max() + 1, np.int64)
        first = np.full(len(owner), NOWHERE, np.int64)
        owner[block], first[block] = row, column * self.size
        return owner, first

    def release(self, sequence: int) -> None:
        for block in self.table[sequence, : self.owned[sequence]].tolist():
            self._owner[block] = -1
            heapq.heappush(self._free, block)
        self.owned[sequence] = 0

    def close_gaps(self) -> list[tuple[int, int]]:
        """Moves the highest blocks into gaps if there are many; returns the (source, target) of each
        copy that this takes."""
        owned = np.flatnonzero(self._owner >= 0)
        count = len(owned)
        if not count or count >= FULL_SHARE * (owned[-1] + 1):
            return []
        source = owned[owned >= count]
        target = np.setdiff1d(np.arange(count), owned)
        self._owner[target], self._column[target] = self._owner[source], self._column[source]
        self._owner[source] = -1
        self.table[self._owner[target], self._column[target]] = target
        self._free = list(range(count, self.total))
        return list(zip(source.tolist(), target.tolist(), strict=True))
