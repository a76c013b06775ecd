"""The launcher's agent on one node: starts and watches its ranks, and exchanges exit codes."""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import suppress
from typing import Any, cast

from torch.distributed import DistError, Store
from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    WorkerGroup,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from megatron_rpp.launcher.ending import Signals, exit_code, with_signals
from megatron_rpp.lifecycle.exit_codes import FAILED, PREEMPTED, REFUSED

FINAL = (REFUSED, PREEMPTED)
"""Codes after which ranks are not restarted: it would fail again, or the scheduler restarts."""
PEER_SECONDS = 60.0
"""How long a failed node waits for the codes of the others: they have 30 seconds to stop ranks."""
READ_SECONDS = 10.0
"""How long it waits until the others have read its own codes."""
GOODBYE_SECONDS = 30.0
"""How long it may take to leave the rendezvous."""


def _report(failed: dict[int, int]) -> None:
    """Prints a line per failed rank."""
    for rank, code in failed.items():
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        print(f"launcher: rank {rank} failed, {how}", file=sys.stderr, flush=True)


class Agent(LocalElasticAgent):
    """Extends torch's agent of one node; uses private hooks of torch 2.11+.

    `run` raises SystemExit with the launcher's code if that is not 0.
    """

    def __init__(self, signals: Signals, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self._signals = signals
        self._codes: list[int] = []

    @property
    def _ranks(self) -> dict[int, SubprocessHandler]:
        """The processes of this node's ranks, by local rank."""
        assert isinstance(self._pcontext, SubprocessContext)
        return self._pcontext.subprocess_handlers

    @property
    def _shared_store(self) -> Store:
        """The store of the rendezvous. torch declares it as None, which it is until then."""
        return cast(Store, self._worker_group.store)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._signals.idle()
        handler = worker_group.spec.rdzv_handler
        if isinstance(handler, DynamicRendezvousHandler):
            # torch would give restarted ranks the store of their predecessors, in which they would
            # read the addresses of dead ranks.
            handler._bootstrap_store_info = None
            handler._shared_tcp_store_server = None
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        self._signals.starting()
        started = super()._start_workers(worker_group)
        self._signals.running([rank.proc for rank in self._ranks.values()])
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if number := self._signals.abort():
            raise SignalException("", number)
        failed = self._failed()  # before torch stops the other ranks, which makes them fail, too
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY and self._shared_store.check(["failed"]):
            self._stop_workers(worker_group)
            self._remaining_restarts = 0
            return RunResult(state=WorkerState.FAILED)
        failed = failed or {rank: failure.exitcode for rank, failure in result.failures.items()}
        self._codes = with_signals(list(failed.values()), self._signals.came)
        if self._signals.came or set(self._codes) & set(FINAL):
            self._remaining_restarts = 0
        elif failed:
            _report(failed)
        return result

    def _failed(self) -> dict[int, int]:
        """The codes of this node's ranks that have failed by now, by rank."""
        codes = {
            worker.global_rank: self._ranks[worker.local_rank].proc.poll()
            for worker in self._worker_group.workers
        }
        return {rank: code for rank, code in codes.items() if code}

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        try:
            result = self._run(role)
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            self._signals.over(ended.code, GOODBYE_SECONDS)
            raise
        self._signals.over(0, GOODBYE_SECONDS)
        return result

    def _run(self, role: str) -> RunResult:
        try:
            result = super().run(role)
        except SignalException as stopped:
            raise SystemExit(128 + stopped.sigval) from None
        except (RendezvousError, DistError) as error:
            print(f"launcher: the other nodes are lost: {error}", file=sys.stderr, flush=True)
            raise SystemExit(FAILED) from None
        if result is None:  # another node closed the rendezvous
            raise SystemExit(FAILED)
        code = exit_code(self._codes)
        if result.is_failed():
            self._share_codes(PEER_SECONDS)
            code = exit_code(self._codes) or FAILED  # 0: another node has failed, and is gone
        if code:
            raise SystemExit(code)
        return result

    def _exit_barrier(self) -> None:
        """torch calls it if all ranks of this node succeeded."""
        self._share_codes(self._exit_barrier_timeout)

    def _share_codes(self, seconds: float) -> None:
        """Collects the codes of all nodes in `_codes`, without nodes that are silent for `seconds`.

        A node must not leave early: it may hold the store with the codes of the others.
        """
        latest = seconds + READ_SECONDS + GOODBYE_SECONDS  # torch would wait longer for a dead node
        self._signals.over(exit_code(self._codes) or PREEMPTED, latest)
        own, store = self._worker_group.group_rank, self._shared_store
        nodes = range(cast(int, self._worker_group.group_world_size))  # declared as None, too
        with suppress(DistError):
            store.set(f"codes/{own}", json.dumps(self._codes))
            if self._codes:
                store.set("failed", "")
            self._wait_for([f"codes/{node}" for node in nodes], seconds)
            present = [node for node in nodes if store.check([f"codes/{node}"])]
            known = [json.loads(store.get(f"codes/{node}")) for node in present]
            self._codes = [code for codes in known for code in codes]
            store.set(f"read/{own}", "")
            self._wait_for([f"read/{node}" for node in present], READ_SECONDS)

    def _wait_for(self, keys: list[str], seconds: float) -> None:
        """Waits until the store has all keys, or until it is time to leave.

        It polls, because a wait inside torch would block signal handlers.
        """
        end = time.monotonic() + seconds
        while not self._shared_store.check(keys):
            # The last second is for the remaining work.
            if time.monotonic() >= min(end, self._signals.leave_at - 1):
                return
            time.sleep(0.1)
