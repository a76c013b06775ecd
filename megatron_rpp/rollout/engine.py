"""The rollout engine in the training process: Megatron's modules with a key-value cache.

Every rank of a replica runs the same loop over the same sequences. The last pipeline stage samples
and broadcasts the tokens. Prompts are sorted by length. A prompt with several samples is prefilled
once, and its cache is repeated. Finished sequences leave the batch.

Left out: refilling the batch while it runs (continuous batching), paged caches, overlap of
pipeline stages.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model import pipeline
from megatron_rpp.model.language_model import Decoding, chunks, decoding
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups, progress_wait
from megatron_rpp.records import Generation, Request, Sampling
from megatron_rpp.rollout.sampling import choose
from megatron_rpp.rollout.stopping import StopTexts
from megatron_rpp.seeds import uniforms

# Compact once this share of the batch has finished: a copy of the cache costs about one token.
COMPACT_SHARE = 0.125


class Abandoned(Exception):
    """The engine was asked to stop before all sequences were finished."""


class RolloutEngine(Protocol):
    """The interface of a rollout engine."""

    def generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        progress: Callable[[int], None] = lambda finished: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Generation]:
        """Returns one generation per request of this replica, in the order of the requests.

        Args:
            progress: called with the number of sequences that have been finished since its last
                call.
            stop: called on every rank, at least once a second; the answers of the ranks may differ.
        Raises:
            Abandoned: on every rank of the replica, soon after `stop` was true on all of them.
        """


@dataclass
class _Wave:
    """Sequences that are decoded together, and their responses so far, on the host."""

    requests: list[Request]
    tokens: np.ndarray  # [n, max_new_tokens]
    logprobs: np.ndarray
    lengths: np.ndarray  # [n] tokens written
    ended: np.ndarray  # [n] bool: by end-of-sequence or a stop string

    @classmethod
    def start(cls, requests: list[Request], max_new_tokens: int) -> _Wave:
        count = len(requests)
        shape = (count, max_new_tokens)
        return cls(
            requests,
            np.zeros(shape, np.int64),
            np.zeros(shape, np.float32),
            np.zeros(count, np.int64),
            np.zeros(count, bool),
        )

    def generations(self) -> list[Generation]:
        return [
            Generation(self.tokens[i, :n].tolist(), self.logprobs[i, :n].tolist(), not ended)
            for i, (n, ended) in enumerate(zip(self.lengths, self.ended))
        ]


class MegatronEngine:
    """Generates with the weights of the policy, on the layout of the policy."""

    def __init__(self, model: torch.nn.Module, tokenizer: Tokenizer, max_batch: int):
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch = max_batch

    @torch.no_grad()
    def generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        progress: Callable[[int], None] = lambda finished: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Generation]:
        """See RolloutEngine. Context-parallel ranks hold the same weights and share the work."""
        group = groups.context_group()
        share = requests[group.rank() :: group.size()]
        own: list[Generation] | None = None
        with suppress(Abandoned):
            own = self._generate(
                share, sampling, seed=seed, step=step, progress=progress, stop=stop
            )
        progress_wait.wait_for_all(group, idle=stop)
        found = groups.gather_objects(own, group) if group.size() > 1 else [own]
        parts: list[list[Generation]] = [part for part in found if part is not None]
        if len(parts) < len(found):
            raise Abandoned
        return [parts[i % len(parts)][i // len(parts)] for i in range(len(requests))]

    def _generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        progress: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> list[Generation]:
        order = sorted(
            range(len(requests)), key=lambda i: (len(requests[i].prompt), requests[i].prompt)
        )
        results: dict[int, Generation] = {}
        self.model.eval()
        try:
            for start in range(0, len(order), self.max_batch):
                chosen = order[start : start + self.max_batch]
                wave = _Wave.start([requests[i] for i in chosen], sampling.max_new_tokens)
                self._run(wave, sampling, seed=seed, step=step, stop=stop)
                results.update(zip(chosen, wave.generations(), strict=True))
                progress(len(chosen))
        finally:
            self.model.train()
        return [results[i] for i in range(len(requests))]

    def _run(
        self,
        wave: _Wave,
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        stop: Callable[[], bool],
    ) -> None:
        lengths = np.array([len(request.prompt) for request in wave.requests])
        ids = np.array([request.sample_id for request in wave.requests])
        alive = np.arange(len(wave.requests))  # the wave's sequences that are in the batch
        with decoding(self.model, int(lengths.max()) + sampling.max_new_tokens) as state:
            hidden = self._read_prompts(wave.requests, state)
            for position in range(sampling.max_new_tokens):
                heartbeat.current.beat()
                random = uniforms(seed, step, ids[alive], position=position)
                chosen = self._next_tokens(
                    hidden, random, sampling, position=position, stopping=stop()
                )
                self._record(wave, alive, chosen, position=position, sampling=sampling)
                running = ~wave.ended[alive]
                if not running.any() or position + 1 == sampling.max_new_tokens:
                    break
                tokens = chosen[0, :-1].long()
                if (~running).mean() >= COMPACT_SHARE:
                    rows = devices.upload(torch.from_numpy(running.nonzero()[0]), tokens.device)
                    state.select(rows)
                    alive, tokens = alive[running], tokens[rows]
                places = lengths[alive] + position
                positions = devices.upload(torch.from_numpy(places), tokens.device)
                state.set_positions(positions, attended=int(places.max()) + 1)
                hidden = pipeline.stage_forward(self.model, tokens[:, None], positions)[0]

    def _read_prompts(self, requests: list[Request], state: Decoding) -> torch.Tensor:
        """Prefills each distinct prompt once. Returns the last hidden state per request, [n, h]."""
        unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt for r in requests))}
        tokens = pad_sequence([torch.tensor(prompt) for prompt in unique], batch_first=True)
        hidden = pipeline.stage_forward(self.model, tokens.to(devices.device()))
        last = torch.tensor([len(prompt) - 1 for prompt in unique], device=hidden.device)
        copies = torch.tensor([unique[r.prompt] for r in requests], device=hidden.device)
        state.select(copies)
        return hidden[last, torch.arange(len(unique), device=hidden.device)][copies]

    def _next_tokens(
        self,
        hidden: torch.Tensor,
        random: np.ndarray,
        sampling: Sampling,
        *,
        position: int,
        stopping: bool,
    ) -> torch.Tensor:
        """Samples on the last stage; all ranks get what one of its ranks has chosen.

        Returns tokens and their log-probs, fp64 [2, b + 1]. The last column is 1 if that rank is
        `stopping`: so all ranks stop after the same token, without another message.
        """
        chosen = torch.empty(2, len(random) + 1, dtype=torch.float64, device=devices.device())
        chosen[:, -1] = float(stopping)
        if groups.is_last_stage():
            forbid = self._ends(sampling) if position < sampling.min_new_tokens else ()
            logits = chunks(self.model)[-1].sampling_logits(hidden)
            tokens, logprobs = choose(logits, random, sampling, forbid=forbid)
            chosen[0, :-1], chosen[1, :-1] = tokens, logprobs
        return groups.broadcast_in_model(chosen)

    def _record(
        self,
        wave: _Wave,
        alive: np.ndarray,
        chosen: torch.Tensor,
        *,
        position: int,
        sampling: Sampling,
    ) -> None:
        """Appends the new tokens of running sequences and marks the sequences that end with them.

        Raises Abandoned if the rank that sampled was asked to stop.
        """
        values = chosen.cpu().numpy()
        if values[0, -1]:
            raise Abandoned
        values = values[:, :-1]
        running = ~wave.ended[alive]
        rows = alive[running]
        wave.tokens[rows, position] = values[0, running]
        wave.logprobs[rows, position] = values[1, running]
        wave.lengths[rows] = position + 1
        wave.ended[rows] = np.isin(wave.tokens[rows, position], self._ends(sampling))
        if sampling.stop and position + 1 >= sampling.min_new_tokens:
            stops = StopTexts(self.tokenizer, sampling.stop)
            first = position + 1 == max(sampling.min_new_tokens, 1)
            for row in rows[~wave.ended[rows]]:
                wave.ended[row] = stops.end(wave.tokens[row, : position + 1].tolist(), first)

    def _ends(self, sampling: Sampling) -> tuple[int, ...]:
        """Tokens that end a response."""
        return (*self.tokenizer.eos_ids, *sampling.stop_token_ids)
