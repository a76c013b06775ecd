"""torchrun for runs that end on purpose: its options, the exit codes of the ranks, time to save.

    python -m megatron_rpp.torchrun [TORCHRUN OPTIONS] -m megatron_rpp.train --config FILE ...

torch's own launcher turns every failure into exit code 1, starts a refused run again, and answers
SIGTERM by killing the ranks 30 seconds later. This one

- exits with the ranks' code, on every node with the same one (see `exit_code`);
- passes SIGTERM and SIGUSR1 on to the ranks and goes on watching them: they save and exit with 75,
  and whoever sent the signal decides how long that may take;
- under ``--max-restarts`` starts crashed ranks again, with a store of their own, but none that
  refused or were preempted;
- stops the ranks of this node when those of another have failed for good.

Left out: ``--run-path``; elastic worlds (``--nnodes 1:4``) are torch's matter, untested here.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from datetime import timedelta

import torch.distributed.launcher.api as launcher
from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, c10d_rendezvous_backend
from torch.distributed.run import parse_args
from torch.distributed.run import run as run_torchrun

from megatron_rpp.failures import FAILED, PREEMPTED, REFUSED

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
FINAL = (REFUSED, PREEMPTED)
"""Codes after which another start would do the same, or is for the scheduler to make."""
PEER_SECONDS = 60.0
"""How long a failed node waits for the codes of the others: they have 30 seconds to stop ranks."""

PROBE_SECONDS = 5.0
"""How long what listens at the rendezvous' port may take to show that it is one."""


def exit_code(codes: list[int]) -> int:
    """The code of a launcher whose ranks failed with `codes` (below 0: killed by that signal).

    What a rank chose to say (refused, preempted, hung) comes first, then the signal that killed
    one, as 128 + signal; its peers fail with 1 for it. SIGTERM is last: launchers send it to stop
    the rest.
    """

    def rank(code: int) -> int:
        return 0 if code > FAILED else 3 if code == -signal.SIGTERM else 2 if code > 0 else 1

    first = min(codes, key=rank, default=0)
    return first if first >= 0 else 128 - first


def _report(failed: dict[int, int]) -> None:
    """A line per rank; refused and preempted ones have said it themselves."""
    for rank, code in failed.items():
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        print(f"launcher: rank {rank} failed, {how}", file=sys.stderr, flush=True)


class Agent(LocalElasticAgent):
    """torch's agent of one node, which starts and watches its ranks; private hooks of torch 2.11+.

    `run` raises SystemExit with the launcher's code where that is not 0.
    """

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self._asked: set[int] = set()  # the signals that came
        self._pending: list[int] = []  # and are not yet passed on
        self._in_rendezvous = False
        self._codes: list[int] = []
        for signum in FORWARDED:
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame) -> None:
        self._asked.add(signum)
        self._pending.append(signum)
        if self._in_rendezvous:
            raise SystemExit(PREEMPTED)  # nothing runs yet, so nothing is lost

    def _rendezvous(self, worker_group) -> None:
        if self._asked:
            raise SystemExit(PREEMPTED)
        # torch would give ranks that it starts again the store of those before, where they read
        # the dead ones' addresses.
        worker_group.spec.rdzv_handler._bootstrap_store_info = None
        worker_group.spec.rdzv_handler._shared_tcp_store_server = None
        self._in_rendezvous = True
        try:
            super()._rendezvous(worker_group)
        finally:
            self._in_rendezvous = False

    def _forward(self) -> None:
        """Passes on the signals received since the last call."""
        while self._pending:
            signum = self._pending.pop(0)
            for pid in self._pcontext.pids().values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signum)

    def _monitor_workers(self, worker_group) -> RunResult:
        self._forward()
        failed = self._failed()  # before torch stops the other ranks, which then fail for that
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY and worker_group.store.check(["failed"]):
            self._stop_workers(worker_group)
            self._remaining_restarts = 0
            return RunResult(state=WorkerState.FAILED)
        failed = failed or {rank: failure.exitcode for rank, failure in result.failures.items()}
        # A rank that a signal to this launcher killed was not ready to save: it had nothing to.
        self._codes = [PREEMPTED if -code in self._asked else code for code in failed.values()]
        if self._asked or set(self._codes) & set(FINAL):
            self._remaining_restarts = 0
        elif failed:
            _report(failed)
        return result

    def _failed(self) -> dict[int, int]:
        """The codes of this node's ranks that have failed by now, by rank."""
        codes = {
            worker.global_rank: self._pcontext.subprocess_handlers[worker.local_rank].proc.poll()
            for worker in self._worker_group.workers
        }
        return {rank: code for rank, code in codes.items() if code}

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
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
        """torch calls it where all ranks of this node succeeded."""
        self._share_codes(self._exit_barrier_timeout)

    def _share_codes(self, seconds: float) -> None:
        """Leaves the codes of all nodes in `_codes`; one that is silent for `seconds` is left out.

        A node that leaves early would take the rendezvous, and with it the others' news, along.
        """
        group = self._worker_group
        nodes = range(group.group_world_size)
        with suppress(DistError):
            group.store.set(f"codes/{group.group_rank}", json.dumps(self._codes))
            if self._codes:
                group.store.set("failed", "")
            with suppress(DistError):
                group.store.wait([f"codes/{node}" for node in nodes], timedelta(seconds=seconds))
            present = [node for node in nodes if group.store.check([f"codes/{node}"])]
            known = [json.loads(group.store.get(f"codes/{node}")) for node in present]
            self._codes = [code for codes in known for code in codes]
            group.store.set(f"read/{group.group_rank}", "")
            group.store.wait([f"read/{node}" for node in present], timedelta(seconds=10))


def _is_this_machine(host: str) -> bool:
    """Whether `host` is an address of this machine, on whatever network card."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, proto=6):
            with socket.socket(family, kind, protocol) as probe, suppress(OSError):
                probe.bind(address)
                return True
    except socket.gaierror:
        pass
    return False


def _answers_as_a_store(host: str, port: int) -> bool:
    """Whether a rendezvous is there already, such as another node's on this machine."""

    def ask() -> None:
        with suppress(DistError):
            TCPStore(host, port, is_master=False, timeout=timedelta(seconds=PROBE_SECONDS))
            answered.set()

    answered = threading.Event()
    # In a thread of its own: torch waits for ever for a program that accepts and says nothing.
    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(PROBE_SECONDS)


def _check_port(endpoint: str) -> None:
    """Exits with REFUSED where the rendezvous is to be here, on a port that another program has.

    torch would take that program for the rendezvous, and wait.
    """
    host, _, port = endpoint.rpartition(":")
    if not port.isdigit() or port == "0" or not _is_this_machine(host):
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
            return
        except OSError as error:
            reason = error.strerror
    if _answers_as_a_store(host, int(port)):
        return
    print(
        f"launcher: port {port} of {host} cannot be used for the rendezvous ({reason}): choose "
        f"another one, --rdzv-endpoint {host}:PORT, the same on every node",
        file=sys.stderr,
    )
    raise SystemExit(REFUSED)


def _leave_early(signum: int, frame) -> None:
    raise SystemExit(PREEMPTED)  # no rank runs yet


def main(argv: list[str] | None = None) -> None:
    for signum in FORWARDED:
        signal.signal(signum, _leave_early)
    args = parse_args(argv)
    if args.rdzv_backend == "c10d" and not args.standalone:
        _check_port(args.rdzv_endpoint)
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # by torch; the rest is the Agent's
    # What it says of failed ranks, `_report` says in a line.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # torch takes both by these names. Its own host check compares names, not addresses.
    launcher.LocalElasticAgent = Agent
    c10d_rendezvous_backend._matches_machine_hostname = _is_this_machine
    try:
        run_torchrun(args)
    except RendezvousError as error:
        print(f"launcher: no rendezvous at {args.rdzv_endpoint}: {error}", file=sys.stderr)
        raise SystemExit(FAILED) from None


if __name__ == "__main__":
    main()
