"""Decides on the host which sequences are in a batch (continuous batching: Yu et al., OSDI 2022).

A slot that a finished sequence leaves goes to the next request. Prompts are read in passes of a
limited number of tokens, so that a long one does not hold up the others for long. A prompt with
several samples is read once, and its blocks are copied.

If the cache is full, the sequence that came last leaves it. It waits for its turn again, keeps the
tokens it has, and is then read like a prompt. So any cache that holds one sequence is large enough.

All ranks of a replica decide the same, because they see the same tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from megatron_rpp.rollout.blocks import Blocks
from megatron_rpp.rollout.responses import Responses

REFILL_SHARE = 1 / 16
"""Share of the slots that must be free before prompts are read: a pass over a few tokens costs almost
as much as one over many."""


@dataclass
class _Prompt:
    """Tokens to write into the cache, for one sequence and for others that begin like it."""

    tokens: tuple[int, ...]
    sequences: list[int]
    written: int = 0


@dataclass(frozen=True)
class Pass:
    """One forward pass over prompts: of sequence i, its tokens from position starts[i] on."""

    sequences: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    tokens: list[tuple[int, ...]] = field(default_factory=list)


class Scheduler:
    """The sequences of one batch."""

    def __init__(
        self,
        responses: Responses,
        queue: deque[int],
        *,
        blocks: Blocks,
        slots: int,
        pass_tokens: int,
    ):
        """
        Args:
            queue: requests that wait; batches may share it.
            slots: most sequences at once.
            pass_tokens: most prompt tokens in a forward pass.
        """
        self.running = np.zeros(0, np.int64)
        """[b]: the sequences that get a token at each step, in the order in which they came."""
        self.responses, self.blocks, self._queue = responses, blocks, queue
        self._slots, self._pass_tokens = slots, pass_tokens
        self._prompts: deque[_Prompt] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.running.size or self._prompts)

    def retire(self) -> int:
        """Takes finished sequences out of the batch; returns their number."""
        finished = self.responses.finished[self.running]
        for sequence in self.running[finished]:
            self.blocks.release(sequence)
        self.running = self.running[~finished]
        return int(finished.sum())

    def reserve(self, ahead: int) -> None:
        """Makes room in the cache for the next `ahead` tokens of each sequence."""
        while True:
            lacking = self.blocks.lacking(self.running, self._lengths(ahead))
            if lacking.sum() <= self.blocks.free:
                break
            self._preempt()
        for place in np.flatnonzero(lacking):
            self.blocks.grow(self.running[place], int(lacking[place]))

    def _lengths(self, ahead: int) -> np.ndarray:
        """[b]: positions that the cache must hold. The last token of a response is not read."""
        responses, rows = self.responses, self.running
        last = responses.prompt_lengths[rows] + responses.most_tokens - 1
        return np.minimum(
            responses.prompt_lengths[rows] + responses.lengths[rows] + ahead - 1, last
        )

    def _preempt(self) -> None:
        """Sends what came last back into the queue."""
        if self._prompts:
            leaving = self._prompts.pop().sequences
        else:
            assert self.running.size > 1, "the cache is too small for one sequence"
            leaving, self.running = [int(self.running[-1])], self.running[:-1]
        for sequence in reversed(leaving):
            self.blocks.release(sequence)
            self._queue.appendleft(sequence)

    def admit(self) -> None:
        """Gives free slots to waiting requests, if enough are free."""
        free = self._slots - self.running.size - sum(len(p.sequences) for p in self._prompts)
        if self.busy and free < max(1, self._slots * REFILL_SHARE):
            return
        while self._queue and free and self._has_room(self._queue[0]):
            sequence, free = self._queue.popleft(), free - 1
            tokens = self.responses.context(sequence)[:-1]  # the last one is read when it decodes
            self.blocks.grow(sequence, self.blocks.count(len(tokens) + 1))
            if not tokens:
                self._start([sequence])
            elif (
                self._prompts
                and not self._prompts[-1].written
                and self._prompts[-1].tokens == tokens
            ):
                self._prompts[-1].sequences.append(sequence)
            else:
                self._prompts.append(_Prompt(tokens, [sequence]))

    def _has_room(self, sequence: int) -> bool:
        """Whether the cache holds a waiting request and one more block for each running sequence that
        may grow."""
        length = self.responses.prompt_lengths[sequence] + self.responses.lengths[sequence]
        may_grow = self.blocks.lacking(self.running, self._lengths(self.responses.most_tokens)) > 0
        growing = int(may_grow.sum()) + sum(len(prompt.sequences) for prompt in self._prompts)
        growing = growing if self.blocks.table.shape[1] > 1 else 0
        return self.blocks.count(int(length)) + growing <= self.blocks.free

    def _start(self, sequences: list[int]) -> None:
        self.running = np.append(self.running, sequences)

    def next_pass(self) -> Pass | None:
        """The next prompts to read: several short ones, or a part of a long one."""
        chosen, left = Pass(), self._pass_tokens
        for prompt in self._prompts:
            tokens = prompt.tokens[prompt.written :]
            if chosen.tokens and (len(tokens) > left or self._pads_too_much(chosen, tokens)):
                break
            tokens = tokens[:left]
            chosen.sequences.append(prompt.sequences[0])
            chosen.starts.append(prompt.written)
            chosen.tokens.append(tokens)
            left -= len(tokens)
            if not left:
                break
        return chosen if chosen.tokens else None

    def _pads_too_much(self, chosen: Pass, tokens: tuple[int, ...]) -> bool:
        """Whether a further prompt makes the pass, padded to its longest one, too large. Only kernels
        for padded sequences need it."""
        longest = max(map(len, (*chosen.tokens, tokens)))
        return (len(chosen.tokens) + 1) * longest > 2 * self._pass_tokens

    def has_read(self, done: Pass) -> list[tuple[int, int]]:
        """Notes a finished pass: prompts that are read join the running sequences.

        Returns pairs (source, target) of blocks to copy, for further samples of the prompts.
        """
        copies: list[tuple[int, int]] = []
        for tokens in done.tokens:
            prompt = self._prompts[0]
            prompt.written += len(tokens)
            if prompt.written == len(prompt.tokens):
                self._prompts.popleft()
                self._start(prompt.sequences)
                copies += self._copies(prompt)
        return copies

    def _copies(self, prompt: _Prompt) -> list[tuple[int, int]]:
        count, first = self.blocks.count(len(prompt.tokens)), prompt.sequences[0]
        source = self.blocks.table[first, :count].tolist()
        return [
            pair
            for sequence in prompt.sequences[1:]
            for pair in zip(source, self.blocks.table[sequence, :count].tolist(), strict=True)
        ]
