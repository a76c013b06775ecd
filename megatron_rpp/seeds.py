"""Random numbers as functions of (seed, step, sample, ...): no state, no dependence on the layout.

The hash is made of operators that NumPy's arrays and torch's tensors share. So the same code runs on the
host, which reads the inputs before torch is loaded, and on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Words = TypeVar("Words", np.ndarray, "torch.Tensor")
"""int64, of any shape."""


def _signed(word: int) -> int:
    """The bits of an unsigned 64-bit integer as a signed one: torch has no arithmetic on the former."""
    return word - 2**64 if word >= 2**63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
BIT = 2.0**-53
"""What the lowest of the bits of `bits_at` is worth in a number in [0, 1)."""


def permutation(size: int, *key: int) -> np.ndarray:
    """Returns [size] int64, a permutation of range(size) drawn from `key` (integers from 0).

    It sorts raw bits of PCG64 and does not call Generator.permutation: NumPy keeps the streams of
    its bit generators stable between releases, but not the methods of Generator (NEP 19).
    """
    bits = np.random.PCG64(np.random.SeedSequence([len(key), *key])).random_raw(size)
    return np.argsort(bits, kind="stable")


def _shift(state: Words, bits: int) -> Words:
    """state >> bits, with zeros from the left."""
    return (state >> bits) & (2 ** (64 - bits) - 1)


def _absorb(state: Words, word: Words) -> Words:
    """The state of the hash after one more word: splitmix64's output function (Steele, Lea, Flood 2014).
    Arithmetic is modulo 2^64."""
    state = state + (word + 1) * _GOLDEN
    state = (state ^ _shift(state, 30)) * _FACTORS[0]
    state = (state ^ _shift(state, 27)) * _FACTORS[1]
    return state ^ _shift(state, 31)


def sample_keys(seed: int, step: int, sample_ids: np.ndarray) -> np.ndarray:
    """Returns [b] int64 keys, one for each of sample_ids [b], for `bits_at`."""
    state = np.zeros(len(sample_ids), np.int64)
    for word in (seed, step, sample_ids):
        state = _absorb(state, np.broadcast_to(np.asarray(word, np.int64), state.shape))
    return state


def bits_at(keys: Words, positions: Words) -> Words:
    """Returns 53 random bits for each key and position of its response. keys and positions are
    broadcast against each other."""
    return _shift(_absorb(keys, positions), 11)


def uniforms(seed: int, step: int, sample_ids: np.ndarray, *, position: int) -> np.ndarray:
    """Returns [b] fp64 numbers in [0, 1), one for each of sample_ids [b] at `position` of its
    response."""
    return bits_at(sample_keys(seed, step, sample_ids), np.array([position])) * BIT


def request_seed(seed: int, step: int, sample_id: int) -> int:
    """A seed below 2^63 for the generator of another program, for one sample."""
    return int(bits_at(sample_keys(seed, step, np.array([sample_id])), np.array([-1]))[0])
