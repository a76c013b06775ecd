"""Sends the samples of a rollout to several servers, all of them at once, and survives their faults.

A thread per request waits for its answer. A server that fails gets no new requests for a while; after
several failures in a row, or an answer that takes too long, it is lost, and its requests go to the
others. What a server that comes back is sent again has the same seed.

Nothing here is collective, so a rollout may also run in a thread beside the training.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition

from megatron_rpp.records import Generation, Request
from megatron_rpp.rollout.engine import Abandoned
from megatron_rpp.rollout.vllm.api import Connections, Failure, Refused, Server
from megatron_rpp.rollout.vllm.samples import Sampler

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0
"""Seconds after a failure; each pause is twice the one before."""
_POLL = 0.2
"""Seconds between two looks at the request to stop."""
_MOST_THREADS, _OTHER_FILES = 4096, 256


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a request, and when a server, is given up."""

    retries: int
    timeout: float
    seconds_per_token: float
    at_once: int
    """Sequences that a server decodes at once; further ones wait."""
    clients: int
    """Clients that share a server; each has as many requests there."""

    def seconds(self, tokens: int, before: int) -> float:
        """The time limit of a response of up to `tokens` tokens, if `before` others of its client are
        on its server."""
        rounds = math.ceil((before + 1) * self.clients / self.at_once)
        return self.timeout + self.seconds_per_token * tokens * rounds


@dataclass
class _State:
    """What the client knows of a server."""

    server: Server
    in_flight: int = 0
    failures: int = 0
    """In a row, counting those of requests that were sent together once."""
    failed_at: float = -math.inf
    problem: str | None = None
    """Why the server is lost; None = it is not."""

    @property
    def pause(self) -> float:
        """Seconds without new requests after the last failure."""
        if self.failures == 0:
            return 0.0
        return min(_FIRST_PAUSE * 2 ** (self.failures - 1), _LONGEST_PAUSE)


@dataclass
class Outcome:
    """What a rollout gave: a generation per request, or None where all servers were lost."""

    generations: list[Generation | None]
    lost: dict[int, str] = field(default_factory=dict)
    """Numbers of the lost servers, and what happened."""


class _NoServer(Exception):
    """All servers are lost."""


class Client:
    """Sends requests to servers."""

    def __init__(self, servers: Sequence[Server], limits: Limits, first: int = 0):
        """first: number of the server to begin with, so that several clients share them evenly."""
        self._states = [_State(server) for server in servers]
        self._order = [*range(first, len(servers)), *range(first)]
        self._limits = limits
        self._changed = Condition()

    def run(
        self,
        requests: Sequence[Request],
        sampler: Sampler,
        *,
        progress: Callable[[int], None] = lambda finished: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Samples all requests.

        Args:
            progress: called with the number of responses that have been finished since the last call.
            stop: called several times a second, in this thread.
        Raises:
            Abandoned: `stop` was true. Everything has been aborted on the servers.
            Refused: a server says that a request is wrong.
        """
        connections = Connections()
        homes = self._homes(requests)
        with ThreadPoolExecutor(_allowed(len(requests))) as pool:
            futures = [
                pool.submit(self._sample, request, home, sampler=sampler, connections=connections)
                for request, home in zip(requests, homes, strict=True)
            ]
            try:
                _watch(futures, progress, stop)
            except BaseException:
                connections.close()
                with self._changed:
                    self._changed.notify_all()
                raise
            found = [future.result() for future in futures]
        lost = {i: s.problem for i, s in enumerate(self._states) if s.problem is not None}
        return Outcome(found, lost | self._changed_weights(sampler.version, lost))

    def _homes(self, requests: Sequence[Request]) -> list[int]:
        """The server of each request: samples of one prompt share it, and with it their prefix."""
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt for r in requests))}
        return [self._order[prompts[r.prompt] % len(self._order)] for r in requests]

    def _sample(
        self, request: Request, home: int, *, sampler: Sampler, connections: Connections
    ) -> Generation | None:
        """The sample of one request, from any server; None if all servers are lost."""
        with suppress(_NoServer):
            while True:
                state, timeout = self._take(home, sampler.sampling.max_new_tokens, connections)
                sent = time.monotonic()
                try:
                    found = sampler.sample(
                        state.server, request, timeout=timeout, connections=connections
                    )
                except Failure as error:
                    if connections.closed:
                        return None
                    self._failed(state, error, sent=sent, timeout=timeout)
                else:
                    self._succeeded(state)
                    return found
        return None

    def _take(self, home: int, tokens: int, connections: Connections) -> tuple[_State, float]:
        """A server that may be asked now, and the time limit. Raises _NoServer."""
        with self._changed:
            while True:
                left = [state for state in self._states if state.problem is None]
                if not left or connections.closed:
                    raise _NoServer
                now = time.monotonic()
                ready = [state for state in left if now >= state.failed_at + state.pause]
                if ready:
                    own = self._states[home]
                    state = own if own in ready else min(ready, key=lambda s: s.in_flight)
                    timeout = self._limits.seconds(tokens, state.in_flight)
                    state.in_flight += 1
                    return state, timeout
                self._changed.wait(min(s.failed_at + s.pause for s in left) - now)

    def _failed(self, state: _State, error: Failure, *, sent: float, timeout: float) -> None:
        with self._changed:
            state.in_flight -= 1
            now = time.monotonic()
            if sent >= state.failed_at:  # others that were sent before have failed with that one
                state.failures += 1
                state.failed_at = now
            if state.failures > self._limits.retries or now - sent >= timeout:
                state.problem = state.problem or str(error)
            self._changed.notify_all()

    def _succeeded(self, state: _State) -> None:
        with self._changed:
            state.in_flight -= 1
            state.failures = 0

    def _changed_weights(self, version: str, lost: dict[int, str]) -> dict[int, str]:
        """Servers whose weights have another version now. Raises RunFailure if any has.

        A streamed response that ends at a stop text does not say its version.
        """
        problems = {}
        for number, state in enumerate(self._states):
            if number not in lost:
                try:
                    found = state.server.weight_version()
                except Failure as error:
                    problems[number] = str(error)
                else:
                    if found != version:
                        raise Refused(f"{state.server.name} got weights of another run: {found}")
        return problems


def _allowed(requests: int) -> int:
    """How many of so many requests this process may have in flight; raises its limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(max(1, requests), _MOST_THREADS)
    if soft < wanted + _OTHER_FILES:
        soft = wanted + _OTHER_FILES
        soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(wanted, soft - _OTHER_FILES))


def _watch(
    futures: Sequence[Future], progress: Callable[[int], None], stop: Callable[[], bool]
) -> None:
    """Waits for all requests; the first that raises ends the wait with its exception."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=_POLL)
        finished = sum(future.result() is not None for future in done)
        if finished:
            progress(finished)
        if stop():
            raise Abandoned
