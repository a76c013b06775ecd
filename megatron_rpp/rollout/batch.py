"""The device's side of a batch: reads prompts, generates tokens, and samples.

The host reads the tokens once in `devices.tokens_per_sync()` tokens. In between, everything that the
next token depends on (positions, random numbers, which sequences have ended) is on the device, and
shapes stay the same. A sequence that ends in between keeps its row until the host reads its tokens.

Left out: work for the device while the host searches for stop texts.

Shape legend: b sequences, padded to `devices.padded_batch(b)` rows; n tokens between two
synchronisations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from megatron_rpp.model import pipeline
from megatron_rpp.model.attention_metadata import AttentionMetadata
from megatron_rpp.model.cuda_graphs import Graphs
from megatron_rpp.model.decoder import Decoder
from megatron_rpp.model.kv_cache import KeyValueCache
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.records import Sampling
from megatron_rpp.rollout.metadata import prompt_metadata, token_metadata, upload
from megatron_rpp.rollout.sampling import choose, uniforms_at
from megatron_rpp.rollout.scheduler import Pass, Scheduler


class Abandoned(Exception):
    """The engine was asked to stop before all sequences were finished."""


@dataclass
class _Tokens:
    """What the device works on between two synchronisations."""

    rows: np.ndarray  # the sequences, without padding
    metadata: AttentionMetadata  # of the tokens that are read next
    tokens: torch.Tensor  # [b] the tokens that are read next
    running: torch.Tensor  # [b] bool
    left: torch.Tensor  # [b] int64: tokens that each sequence may still get
    uniforms: torch.Tensor  # [n, b]
    early: torch.Tensor | None  # [n, b] bool: before min_new_tokens
    chosen: list[torch.Tensor] = field(default_factory=list)  # [2, b + 1] each, see Batch.sample
    arriving: dist.Work | None = None

    @property
    def complete(self) -> bool:
        """Whether the host has to read the tokens before the next one."""
        return len(self.chosen) == len(self.uniforms)


class Batch:
    """One batch of sequences on this rank."""

    def __init__(
        self,
        scheduler: Scheduler,
        stages: list[Decoder],
        cache: KeyValueCache,
        *,
        graphs: Graphs,
        sampling: Sampling,
        keys: np.ndarray,
    ):
        """
        Args:
            stages: this rank's chunks, in order.
            graphs: cleared when the cache is freed.
            keys: of the random numbers, one per sequence (`seeds.sample_keys`).
        """
        self.abandoned = False
        """Whether the rank that samples was asked to stop."""
        self.scheduler, self._stages, self._cache = scheduler, stages, cache
        self._responses, self._blocks = scheduler.responses, scheduler.blocks
        self._sampling, self._keys = sampling, keys
        self._ends = upload(np.array(self._responses.end_tokens, np.int64))
        self._now: _Tokens | None = None
        self._pass: Pass | None = None  # prompts that are being read
        self._prompts: tuple[torch.Tensor, AttentionMetadata] | None = (
            None  # and their tokens, until they are
        )
        self._hidden: torch.Tensor | None = None
        self._sending: list[tuple[dist.Work, torch.Tensor]] = []
        self._graphs, self._stopping = graphs, False

    def begin(self, stopping: bool) -> int:
        """Prepares the next token; returns how many sequences the last ones have finished.

        stopping: whether this rank was asked to stop.
        """
        self._stopping = stopping
        self._sent()
        if self._now is not None:
            self._receive(self._now)
            if not self._now.complete:
                self._advance(self._now)
                return 0
            self._synchronise(self._now)
        finished = self.scheduler.retire()
        if self._pass is not None:
            self._copy(self.scheduler.has_read(self._pass))
        self.scheduler.admit()
        self.scheduler.reserve(devices.tokens_per_sync())
        self._pass = self.scheduler.next_pass()
        self._cache.use(self._blocks.highest)
        if devices.scans_cache():
            self._copy(self._blocks.close_gaps())
        self._prompts = None if self._pass is None else self._lay_out(self._pass)
        self._now = self._prepare() if self.scheduler.running.size else None
        return finished

    def _sent(self) -> None:
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def _receive(self, now: _Tokens) -> None:
        if now.arriving is not None:
            now.arriving.wait()
            now.arriving = None

    def _synchronise(self, now: _Tokens) -> None:
        """Brings the tokens since the last synchronisation to the host."""
        found = torch.stack(now.chosen).cpu().numpy()
        # Every rank finishes the round first, because the others have begun to send.
        self.abandoned |= bool(found[:, 0, -1].any())
        for tokens, logprobs in found[:, :, :-1]:
            self._responses.append(now.rows, tokens, logprobs)

    def _advance(self, now: _Tokens) -> None:
        """Makes the last tokens the next ones to read. The host does not wait."""
        tokens = now.chosen[-1][0, :-1].long()
        count = len(tokens)
        now.left -= 1
        ended = (tokens[:, None] == self._ends).any(1) | (now.left <= 0)
        now.running &= ~ended
        now.tokens[:count] = tokens
        positions = now.metadata.positions.clone()
        positions[:count] += now.running
        now.metadata = replace(now.metadata, positions=positions)

    def _lay_out(self, prompts: Pass) -> tuple[torch.Tensor, AttentionMetadata]:
        """The tokens of prompts end to end, and their metadata."""
        lengths = [len(tokens) for tokens in prompts.tokens]
        metadata = prompt_metadata(
            self._blocks,
            prompts.sequences,
            prompts.starts,
            lengths=lengths,
            dtype=self._cache.dtype,
        )
        return upload(np.concatenate(prompts.tokens).astype(np.int64)), metadata

    def _copy(self, blocks: list[tuple[int, int]]) -> None:
        """Copies blocks of the cache: (source, target) each."""
        if blocks:
            source, target = np.array(blocks, np.int64).T.copy()
            self._cache.copy(upload(source), upload(target))

    def _prepare(self) -> _Tokens:
        """The state of the device for the next tokens."""
        rows, responses, sampling = self.scheduler.running, self._responses, self._sampling
        lengths, least = responses.lengths[rows], sampling.min_new_tokens
        # Prompts that have been read start at the next synchronisation.
        most = 1 if self._pass is not None else devices.tokens_per_sync()
        steps = min(most, sampling.max_new_tokens - int(lengths.min()))
        metadata = token_metadata(
            self._blocks, rows, responses.prompt_lengths[rows] + lengths - 1,
            ahead=steps, dtype=self._cache.dtype,
        )  # fmt: skip
        tokens = np.zeros(len(metadata.positions), np.int64)
        tokens[: len(rows)] = responses.last_tokens(rows)
        generated = upload(lengths)
        positions = generated + torch.arange(steps, device=generated.device)[:, None]
        return _Tokens(
            rows,
            metadata,
            upload(tokens),
            running=upload(np.ones(len(rows), bool)),
            left=sampling.max_new_tokens - generated,
            uniforms=uniforms_at(upload(self._keys[rows]), positions),
            early=positions < least if int(lengths.min()) < least else None,
        )

    def forward(self, decoder: Decoder) -> None:
        """Runs prompts and the next tokens through one chunk of this rank."""
        if self._prompts is not None:
            self._forward(decoder, *self._prompts)
        if self._now is not None:
            self._hidden = self._forward(decoder, self._now.tokens, self._now.metadata)

    def _forward(
        self, decoder: Decoder, tokens: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        given = (
            tokens if decoder.chunk.pre_process else pipeline.receive(decoder.chunk, len(tokens))
        )
        if metadata.row is None:
            attended = 0 if metadata.paged else metadata.attended
            key = (id(self), id(decoder), len(tokens), attended)
            hidden = self._graphs.run(
                key, partial(self._compute, decoder), given=given, metadata=metadata
            )
        else:
            hidden = self._compute(decoder, given, metadata)
        if not decoder.chunk.post_process:
            self._sending.append((pipeline.send(hidden), hidden))
        return hidden

    def _compute(
        self, decoder: Decoder, given: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        attend = partial(self._cache.attend, metadata=metadata)
        return decoder.forward(given, metadata.positions, attend)

    def sample(self) -> None:
        """Samples on the last stage, and starts to send all ranks what one of its ranks has chosen.

        That is tokens and log-probs, fp64 [2, b + 1]. The last column is 1 if that rank was asked to
        stop. So all ranks stop after the same token, without another message.
        """
        now, self._prompts = self._now, None
        if now is None:
            return
        count, step = len(now.rows), len(now.chosen)
        chosen = torch.empty(2, count + 1, dtype=torch.float64, device=now.tokens.device)
        chosen[:, -1] = float(self._stopping)
        if groups.is_last_stage():
            assert self._hidden is not None
            logits = self._stages[-1].logits(self._hidden[:count])
            early = now.early is not None
            tokens, logprobs = choose(
                logits,
                now.uniforms[step],
                self._sampling,
                forbid=self._responses.end_tokens if early else (),
                rows=now.early[step] if now.early is not None else None,
            )
            chosen[0, :-1], chosen[1, :-1] = tokens, logprobs
        now.chosen.append(chosen)
        now.arriving = groups.broadcast_in_model(chosen)

    def settle(self) -> None:
        """Waits for the messages that are under way."""
        self._sent()
        if self._now is not None:
            self._receive(self._now)
