"""The order in which prompts are trained on: a function of (seed, position) alone.

So a run that resumes at any step, on any number of ranks, takes the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megatron_rpp.seeds import permutation, uniforms

_BLOCK = 1 << 16
"""Number of positions whose sources are drawn at a time."""
_MIXTURE = -2
"""Stands for the step in the key of the random numbers: no real step is negative."""


def prompt_indices(cursor: int, count: int, *, size: int, seed: int) -> list[int]:
    """Rows to train on at the global positions ``cursor .. cursor + count - 1``.

    Position p lies in epoch p // size; every epoch is a permutation of ``range(size)`` drawn from
    (seed, epoch). The range may cross epochs.

    Args:
        cursor: number of prompts consumed so far, over all steps and ranks.
        count: number of prompts to take.
        size: number of rows of the data set.
        seed: seed of the order, at least 0.
    """
    if cursor < 0 or count < 0 or size < 1 or seed < 0:
        raise ValueError(
            f"cursor {cursor}, count {count} and seed {seed} must be at least 0, size {size} 1"
        )
    positions = range(cursor, cursor + count)
    return [int(_epoch_order(size, seed, p // size)[p % size]) for p in positions]


class Mixture:
    """The order of prompts from several data sets that are mixed in given shares.

    The source of position p is drawn from (seed, p); the k-th draw from a source takes row k % size
    of its epoch k // size. Each epoch of each source is a permutation of its rows.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._sizes = list(sizes)
        self._bounds = np.cumsum(np.asarray(weights, np.float64) / sum(weights))[:-1]
        self._seed = seed
        self._before = [np.zeros(len(sizes), np.int64)]
        """Number of draws from each source before the start of each block, as far as computed."""

    def rows(self, cursor: int, count: int) -> list[tuple[int, int]]:
        """(source, row of that source) at the positions ``cursor .. cursor + count - 1``."""
        return [self._row(position) for position in range(cursor, cursor + count)]

    def _row(self, position: int) -> tuple[int, int]:
        block, inside = divmod(position, _BLOCK)
        sources = self._sources(block)
        source = int(sources[inside])
        draw = self._drawn_before(block)[source] + np.count_nonzero(sources[:inside] == source)
        epoch, row = divmod(int(draw), self._sizes[source])
        return source, int(_epoch_order(self._sizes[source], self._seed, epoch, source)[row])

    def _drawn_before(self, block: int) -> np.ndarray:
        for number in range(len(self._before) - 1, block):
            drawn = np.bincount(self._sources(number), minlength=len(self._sizes))
            self._before.append(self._before[-1] + drawn)
        return self._before[block]

    def _sources(self, block: int) -> np.ndarray:
        return _draw_sources(block, tuple(self._bounds), self._seed)


@lru_cache(maxsize=4)
def _draw_sources(block: int, bounds: tuple[float, ...], seed: int) -> np.ndarray:
    """[_BLOCK] the source of each position of a block."""
    positions = np.arange(block * _BLOCK, (block + 1) * _BLOCK)
    return np.searchsorted(bounds, uniforms(seed, _MIXTURE, positions, position=0), side="right")


@lru_cache(maxsize=16)
def _epoch_order(size: int, *key: int) -> np.ndarray:
    return permutation(size, *key)
