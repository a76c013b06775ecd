"""The rollout engine in the training process: the policy's weights with a key-value cache.

Every rank of a replica runs the same loop over the same sequences, in one batch for each pipeline
stage: while a stage works on one batch, the others work on the others. The last stage samples and
broadcasts the tokens.

Left out: blocks of the cache that several samples of a prompt share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch

from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model import attention_metadata
from megatron_rpp.model.cuda_graphs import Graphs
from megatron_rpp.model.decode_sizes import PASS_TOKENS
from megatron_rpp.model.decoder import Decoder, decoders
from megatron_rpp.model.kv_cache import KeyValueCache
from megatron_rpp.parallel import groups, progress_wait
from megatron_rpp.records import Generation, Request, Sampling
from megatron_rpp.rollout.batch import Abandoned, Batch
from megatron_rpp.rollout.blocks import Blocks, blocks_of
from megatron_rpp.rollout.planning import shard
from megatron_rpp.rollout.responses import Responses
from megatron_rpp.rollout.scheduler import Scheduler
from megatron_rpp.seeds import sample_keys


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


class MegatronEngine:
    """Generates with the weights of the policy, on the layout of the policy."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Tokenizer,
        *,
        max_batch: int,
        max_cache_tokens: int | None = None,
    ):
        """
        Args:
            max_batch: most sequences at once, on each context-parallel rank of this replica.
            max_cache_tokens: most positions of its cache, at least those of one sequence; None = as
                many as max_batch sequences need.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.max_cache_tokens = max_cache_tokens
        self._graphs = Graphs()

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
        share = [requests[i] for i in shard(len(requests), group.rank(), group.size())]
        own: list[Generation] | None = None
        with suppress(Abandoned):
            responses = Responses(share, sampling, self.tokenizer)
            if share:
                self._run(responses, sampling, seed=seed, step=step, progress=progress, stop=stop)
            own = responses.generations()
        progress_wait.wait_for_all(group, idle=stop)
        found = groups.gather_objects(own, group) if group.size() > 1 else [own]
        parts: list[list[Generation]] = [part for part in found if part is not None]
        if len(parts) < len(found):
            raise Abandoned
        return [generation for part in parts for generation in part]

    def _run(
        self,
        responses: Responses,
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        progress: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> None:
        stages, queue = decoders(self.model), _by_prompt(responses.requests)
        keys = sample_keys(seed, step, responses.sample_ids)
        batches = self._batches(stages, responses, queue, sampling=sampling, keys=keys)
        try:
            while queue or any(batch.scheduler.busy for batch in batches):
                heartbeat.current.beat()
                _next_token(stages, batches, progress=progress, stop=stop)
        except Abandoned:
            _settle(batches)
            raise
        finally:
            self._graphs.clear()
        _settle(batches)

    def _batches(
        self,
        stages: list[Decoder],
        responses: Responses,
        queue: deque[int],
        *,
        sampling: Sampling,
        keys: np.ndarray,
    ) -> list[Batch]:
        """One for each pipeline stage, as far as sequences and cache allow."""
        one, room = blocks_of(responses.longest), self.max_cache_tokens
        count = min(groups.pipeline_group().size(), len(queue), self.max_batch)
        if room is not None:
            count = max(1, min(count, room // (one * attention_metadata.block_size())))
            room //= count
        batches, total = [], min(self.max_batch, len(queue))
        for number in range(count):
            slots = len(shard(total, number, count))
            blocks = Blocks.within(
                room, sequences=len(queue), at_once=slots, longest=responses.longest
            )
            scheduler = Scheduler(
                responses, queue, blocks=blocks, slots=slots, pass_tokens=PASS_TOKENS
            )
            cache = new_cache(stages, blocks.total)
            batches.append(
                Batch(scheduler, stages, cache, graphs=self._graphs, sampling=sampling, keys=keys)
            )
        return batches


def _next_token(
    stages: list[Decoder],
    batches: list[Batch],
    *,
    progress: Callable[[int], None],
    stop: Callable[[], bool],
) -> None:
    """One token of every sequence. Interleaved stages take all batches through one chunk before the
    next, so that no stage waits for a batch while it could work on another.

    Raises:
        Abandoned: on every rank, if the rank that samples was asked to stop.
    """
    for decoder in stages:
        for batch in batches:
            if decoder is stages[0]:
                progress(batch.begin(stop()))
            batch.forward(decoder)
            if decoder is stages[-1]:
                batch.sample()
    if any(batch.abandoned for batch in batches):
        raise Abandoned


def _settle(batches: list[Batch]) -> None:
    """Waits for the messages that are under way."""
    for batch in batches:
        batch.settle()


def _by_prompt(requests: list[Request]) -> deque[int]:
    """The requests in order of their prompts, so that equal ones are read together."""
    order = range(len(requests))
    return deque(sorted(order, key=lambda i: (len(requests[i].prompt), requests[i].prompt)))


def new_cache(stages: list[Decoder], blocks: int) -> KeyValueCache:
    """A cache of this many blocks for the layers of a rank's chunks."""
    return KeyValueCache(
        layers=sum(decoder.layers for decoder in stages),
        blocks=blocks,
        kv_heads=stages[0].kv_heads,
        head_size=stages[0].head_size,
        dtype=stages[0].chunk.config.params_dtype,
    )
