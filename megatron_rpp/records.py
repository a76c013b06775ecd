"""The typed records that pass between the stages of a step.

Shape legend: b sequences of a micro-batch, s its padded length, n its response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One sequence to generate: the prompt, and the number that its random numbers derive from."""

    prompt: tuple[int, ...]
    sample_id: int


@dataclass(frozen=True)
class Generation:
    """A finished response. `logprobs` are of the untruncated distribution at the temperature."""

    tokens: list[int]
    logprobs: list[float]
    truncated: bool  # it ran into max_new_tokens


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded sequences for one forward pass, and which of its rows predict a response token.

    tokens: [b, s] int64; rows: [n] indices into the flattened hidden states [s*b]; targets: [n]
    the tokens those rows predict; column: [n] where each lies in the buffer's flat columns (on the
    host, as they are); sample: [n] the row's sequence in 0..b-1. A rank with fewer micro-batches
    than its peers fills up with empty ones (n = 0).
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    column: torch.Tensor
    sample: torch.Tensor
