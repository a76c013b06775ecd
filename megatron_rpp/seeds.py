"""Random numbers as functions of (seed, step, sample, ...): no state, no dependence on the layout."""

from __future__ import annotations

import numpy as np
import torch


def _signed(word: int) -> int:
    """The bits of an unsigned 64-bit integer as a signed one: torch has no arithmetic on the former."""
    return word - 2**64 if word >= 2**63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def permutation(size: int, *key: int) -> np.ndarray:
    """Returns [size] int64, a permutation of range(size) drawn from `key` (integers from 0).

    It sorts raw bits of PCG64 and does not call Generator.permutation: NumPy keeps the streams of
    its bit generators stable between releases, but not the methods of Generator (NEP 19).
    """
    bits = np.random.PCG64(np.random.SeedSequence([len(key), *key])).random_raw(size)
    return np.argsort(bits, kind="stable")


def _shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    """state >> bits, with zeros from the left."""
    return (state >> bits) & (2 ** (64 - bits) - 1)


def _mix(state: torch.Tensor) -> torch.Tensor:
    """splitmix64's output function (Steele, Lea, Flood 2014). Products are modulo 2^64."""
    state = (state ^ _shift(state, 30)) * _FACTORS[0]
    state = (state ^ _shift(state, 27)) * _FACTORS[1]
    return state ^ _shift(state, 31)


def _absorb(state: torch.Tensor, word: torch.Tensor | int) -> torch.Tensor:
    """The state of the hash after one more word of the key."""
    word = word if isinstance(word, torch.Tensor) else state.new_full((), word)
    return _mix(state + (word + 1) * _GOLDEN)


def sample_keys(seed: int, step: int, sample_ids: torch.Tensor) -> torch.Tensor:
    """Returns int64 keys, one for each of `sample_ids` (int64, of any shape), for `uniforms_at`."""
    state = torch.zeros((), dtype=torch.int64, device=sample_ids.device)
    return _absorb(_absorb(_absorb(state, seed), step), sample_ids)


def uniforms_at(keys: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
    """Returns fp64 numbers in [0, 1), one for each key and position of its response.

    keys and position, int64, are broadcast against each other; a GPU works on its own.
    """
    return _shift(_absorb(keys, position), 11).double() * 2.0**-53


def uniforms(seed: int, step: int, sample_ids: torch.Tensor, *, position: int) -> torch.Tensor:
    """Returns fp64 numbers in [0, 1), one for each sample at `position` of its response."""
    return uniforms_at(sample_keys(seed, step, sample_ids), position)


def request_seed(seed: int, step: int, sample_id: int) -> int:
    """A seed below 2^63 for the generator of another program, for one sample."""
    return int(uniforms(seed, step, torch.tensor(sample_id), position=-1).item() * 2.0**53)
