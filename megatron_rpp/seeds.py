"""Random numbers as functions of (seed, step, sample, ...): no state, no dependence on the layout."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permutation(size: int, *key: int) -> np.ndarray:
    """Returns [size] int64, a permutation of range(size) drawn from `key` (integers from 0).

    It sorts raw bits of PCG64 and does not call Generator.permutation: NumPy keeps the streams of
    its bit generators stable between releases, but not the methods of Generator (NEP 19).
    """
    bits = np.random.PCG64(np.random.SeedSequence([len(key), *key])).random_raw(size)
    return np.argsort(bits, kind="stable")


def _mix(state: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele, Lea, Flood 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(
    seed: int, step: int, sample_ids: np.ndarray, *, position: int | np.ndarray
) -> np.ndarray:
    """Returns [b] fp64 numbers in [0, 1), one per sample, for `position` (one, or [b]) of its
    response."""
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64
        state = np.zeros(len(sample_ids), dtype=np.uint64)
        for part in (seed, step, sample_ids, position):
            word = np.asarray(part, dtype=np.int64).astype(np.uint64)
            state = _mix(state + (word + np.uint64(1)) * _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def request_seed(seed: int, step: int, sample_id: int) -> int:
    """A seed below 2^63 for the generator of another program, for one sample."""
    return int(uniforms(seed, step, np.array([sample_id]), position=-1)[0] * 2.0**53)
