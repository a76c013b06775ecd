"""Ends a run that hangs, and reports which rank is missing and in which phase.

On every rank, a thread keeps rewriting `<logging.dir>/alive/rank_00000` with the current phase and
a growing count. If the main thread gives no sign of life for too long, in a collective, a reward or
anywhere else, the thread writes all stacks to `<logging.dir>/stacks/`, checks which counts have
stopped growing, and ends the process with exit code HUNG. The launcher then ends the other ranks.

If a count stands still, the process is stopped or dead. If it still grows, the process waits or is
stuck in the phase that the report names.

Left out: hangs before the run is built.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.exit_codes import HUNG

LONGEST_INTERVAL = 10.0
"""Seconds between two updates of the file of a rank, at most."""


class Watchdog:
    """The watchdog of one rank."""

    def __init__(self, directory: str, *, rank: int, world: int, minutes: float):
        """
        Args:
            directory: logging.dir.
            minutes: how long the main thread may go without a sign of life.
        """
        self._alive, self._stacks = Path(directory) / "alive", Path(directory) / "stacks"
        self._rank, self._world, self._limit = rank, world, 60 * minutes
        self._interval = min(LONGEST_INTERVAL, self._limit / 8)
        self._beats, self._ending = 0, False
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the main thread while the context is open."""
        self._alive.mkdir(parents=True, exist_ok=True)
        heartbeat.enter("start")
        self._beat()  # over the file that an earlier attempt may have left
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            self._file(self._rank).unlink(missing_ok=True)
            with suppress(OSError):  # not empty: other ranks are still there
                self._alive.rmdir()

    def _file(self, rank: int) -> Path:
        return self._alive / f"rank_{rank:05d}"

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            self._beat()
            if time.monotonic() - heartbeat.current.since > self._limit:
                self._end()

    def _beat(self) -> None:
        self._beats += 1
        sign = {"beats": self._beats, "phase": heartbeat.current.name, "ending": self._ending}
        sign |= {"process": os.getpid(), "host": socket.gethostname()}
        temporary = self._file(self._rank).with_suffix(".new")
        temporary.write_text(json.dumps(sign))
        temporary.replace(self._file(self._rank))

    def _signs(self) -> dict[int, dict]:
        """The last sign of life of each rank that has given one."""
        found = {}
        for rank in range(self._world):
            with suppress(FileNotFoundError):
                found[rank] = json.loads(self._file(rank).read_text())
        return found

    def _end(self) -> None:
        self._ending = True
        self._stacks.mkdir(exist_ok=True)
        with open(self._stacks / f"rank_{self._rank:05d}.txt", "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        before = self._signs()
        for _ in range(4):  # long enough for the heartbeat of every living rank
            time.sleep(self._interval / 2)
            self._beat()
        after = self._signs()
        # A rank that has noticed the hang first may have ended meanwhile: it was no missing rank.
        counting = [
            rank for rank, sign in after.items() if sign["ending"] or before.get(rank) != sign
        ]
        if self._rank == min(rank for rank in counting if after[rank]["ending"]):
            print(self._report(after, counting), file=sys.stderr, flush=True)
        else:
            time.sleep(self._interval)  # gives the reporting rank time to print
        os._exit(HUNG)

    def _report(self, signs: dict[int, dict], counting: list[int]) -> str:
        where = defaultdict(list)
        for rank in counting:
            where[signs[rank]["phase"]].append(rank)
        missing = [
            f"rank {rank} ({self._name(signs, rank)}) is missing"
            for rank in range(self._world)
            if rank not in counting
        ]
        waiting = [f"in {phase}: {_short(ranks)}" for phase, ranks in where.items()]
        return (
            f"error: the run hangs, without progress for {self._limit:.0f} s: "
            f"{'; '.join([*missing, *waiting])}. Stacks: {self._stacks}"
        )

    @staticmethod
    def _name(signs: dict[int, dict], rank: int) -> str:
        if rank not in signs:
            return "never heard of"
        sign = signs[rank]
        return f"process {sign['process']} on {sign['host']}, last seen in {sign['phase']}"


def _short(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16]))
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {shown}" + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
