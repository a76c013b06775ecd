"""The typed records that pass between the stages of a step.

Shape legend: k sequences of a micro-batch, t tokens of its row on this rank, c context-parallel ranks,
n response tokens predicted on this rank.
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
    """Texts that end a response."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, beside the tokenizer's own ends."""


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
class Packing:
    """Where the sequences of a packed row lie, for attention.

    boundaries: [k+1] int32, where each of the k sequences starts in the whole row, then its length
    t·c; longest: tokens of the longest. The rest serves attention without a kernel for packed rows:
    it lays the row out as k padded sequences. query_cells: [t] and key_cells: [t·c] int64, the place
    of each token in [k × longest/c] and [k × longest]. Where the row is split over c context-parallel
    ranks, gathered: [t·c], the place of each token of the row in what the ranks hold one after the
    other; visible: [k, 1, longest/c, longest] bool, which keys a query sees. None where c = 1.
    """

    boundaries: torch.Tensor
    longest: int
    query_cells: torch.Tensor
    key_cells: torch.Tensor
    gathered: torch.Tensor | None = None
    visible: torch.Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Sequences end to end in one row for one forward pass, and where response tokens are predicted.

    tokens: [1, t] int64, this context-parallel rank's part of the row; positions: [t] of each token
    in its sequence; rows: [n] the hidden states [t] that predict a response token; targets: [n] those
    tokens; column: [n] where each lies in the buffer's flat columns (on the host, as they are).
    A rank with fewer micro-batches than its peers fills up with empty ones (n = 0).
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    packing: Packing
    rows: torch.Tensor
    targets: torch.Tensor
    column: torch.Tensor
