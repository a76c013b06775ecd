"""The requests of one push of weights: one time limit for all of them, and an early end if the run is
told to stop.

Threads send them. The main thread waits, gives signs of life and asks whether to stop: the time limit
ends a push that hangs, not the watchdog.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.rollout.vllm.api import Connections, Failure, Refused, Server

Problems = dict[int, str]
"""What went wrong with a server, by its number."""
_POLL = 0.2
"""Seconds between two signs of life."""


class Push:
    """Requests to the servers of this rank. A server with a problem gets no more of them."""

    def __init__(self, servers: Mapping[int, Server], *, seconds: float, stop: Callable[[], bool]):
        """
        Args:
            seconds: time limit of all requests together.
            stop: asked while this rank waits; once it is true, the requests are broken off.
        """
        self.problems: Problems = {}
        self._servers, self.stop = servers, stop
        self._limit, self._deadline = seconds, time.monotonic() + seconds
        self._connections = Connections()
        self._sent: dict[int, Future[str | None]] = {}
        self._pool = ThreadPoolExecutor(max(1, len(servers)))

    def on_all(self, task: Callable[[Server], object]) -> None:
        """Runs `task` for all servers at the same time, and notes what went wrong."""
        self.begin(task)
        self.finish()

    def begin(self, task: Callable[[Server], object]) -> None:
        """Starts `task` for all servers; `finish` must follow."""
        self._sent = {
            number: self._pool.submit(self._run, task, server)
            for number, server in self._servers.items()
            if number not in self.problems
        }

    def finish(self) -> None:
        """Waits for what `begin` started."""
        waiting = set(self._sent.values())
        while waiting:
            _, waiting = wait(waiting, timeout=_POLL)
            self.look()
        self._sent = {}

    def look(self) -> None:
        """Gives a sign of life, breaks off the requests on a stop, notes what went wrong."""
        heartbeat.current.beat()
        if self.stop():
            self.break_off()
        for number, future in self._sent.items():
            if future.done() and (problem := future.result()) is not None:
                self.problems[number] = problem

    def break_off(self) -> None:
        """Ends all requests, also those to come."""
        self._connections.close()

    @property
    def over(self) -> str | None:
        """Why nothing more can come of this push, as far as this rank knows; None if it can."""
        if self.problems:
            return next(iter(self.problems.values()))
        if self._connections.closed:
            return "its requests were broken off"
        if time.monotonic() > self._deadline:
            return f"it took longer than {self._limit:.0f} s (rollout.vllm.start_timeout)"
        return None

    def _run(self, task: Callable[[Server], object], server: Server) -> str | None:
        try:
            task(server)
        except (Failure, Refused) as error:
            return f"{server.name} did not take new weights: {error}"
        return None

    def ask(self, server: Server, path: str, body: Any = None) -> Any:
        """The answer to one request. Raises Failure or Refused."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Failure(f"{path} was not sent: {self.over}")
        return server.ask(path, body, timeout=left, connections=self._connections)

    def start_update(self, server: Server) -> None:
        """Aborts all requests, empties the prefix cache, which an update does not do, and starts an
        update; then come the calls of /update_weights. An update that a run has left unfinished is
        ended before. Raises Failure or Refused."""
        self.ask(server, "/pause?mode=abort&clear_cache=true")
        self.ask(server, "/collective_rpc", {"method": "rpp_end_update"})
        self.ask(server, "/start_weight_update")

    def send(self, server: Server, info: dict[str, Any]) -> None:
        """One call of /update_weights. Raises Failure or Refused."""
        self.ask(server, "/update_weights", {"update_info": info})

    def finish_update(self, server: Server, version: str) -> None:
        """Ends the update: all new responses say `version`. Raises Failure or Refused."""
        self.ask(server, "/finish_weight_update", {"weight_version": version})

    def resume(self, server: Server, version: str) -> None:
        """Takes requests again. Raises Failure or Refused, also if the version is another."""
        self.ask(server, "/resume")
        found = server.weight_version()
        if found != version:
            raise Failure(f"the weights are of version {found}, not {version}")
