"""The typed records that the stages of a step pass to each other.

Shape legend: k sequences of a micro-batch, t tokens of its row on this rank, c context-parallel
ranks, n response tokens that this rank predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the inputs of a run use these records before torch is imported
    import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k = 0 and top_p = 1 are off."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end a response."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, in addition to the tokenizer's end tokens."""


@dataclass(frozen=True)
class StepKey:
    """What the prompts and the random numbers of a step follow from, on any layout."""

    seed: int
    step: int
    """Steps before this one."""
    prompts_seen: int
    """Data position: prompts that the steps before this one took."""


@dataclass(frozen=True)
class Request:
    """One sequence to generate: the prompt, and the id from which its random numbers derive."""

    prompt: tuple[int, ...]
    sample_id: int


@dataclass(frozen=True)
class Generation:
    """A finished response."""

    tokens: list[int]
    logprobs: list[float]
    """Under the distribution at the temperature, before top_k and top_p cut it."""
    truncated: bool
    """Whether max_new_tokens ended it."""


@dataclass(frozen=True)
class Packing:
    """The positions of the sequences in a packed row, for attention.

    Kernels for packed rows need the first two fields only. Without such a kernel, attention lays
    the row out as k padded sequences and needs the other fields too.
    """

    boundaries: torch.Tensor
    """[k+1] int32: the start of each of the k sequences in the whole row, then its length t·c."""
    longest: int
    """Tokens of the longest sequence."""
    query_cells: torch.Tensor
    """[t] int64: the index of each of this rank's tokens in [k × longest/c]."""
    key_cells: torch.Tensor
    """[t·c] int64: the index of each token of the row in [k × longest]."""
    gathered: torch.Tensor | None = None
    """[t·c]: the index of each token of the row in the concatenation of all context-parallel ranks'
    tokens; None if c = 1."""
    visible: torch.Tensor | None = None
    """[k, 1, longest/c, longest] bool: which keys a query sees; None if c = 1."""


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass: sequences end to end in one row.

    A rank with fewer micro-batches than its peers adds empty ones (n = 0).
    """

    tokens: torch.Tensor
    """[1, t] int64: this context-parallel rank's part of the row."""
    positions: torch.Tensor
    """[t]: the position of each token in its sequence."""
    packing: Packing
    rows: torch.Tensor
    """[n]: the indices of the hidden states [t] that predict a response token."""
    targets: torch.Tensor
    """[n]: the tokens that they predict."""
    column: torch.Tensor
    """[n]: the index of each target in the buffer's flat columns; on the host, as they are."""
