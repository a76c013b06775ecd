"""A barrier that lasts as long as the rank that is waited for makes progress.

A collective ends the run after groups.COLLECTIVE_TIMEOUT, and a rank that waits in one gives no sign
of life. But one replica may decode, score or write for longer than that after the others are done.
So before such a collective the ranks meet in the store of the process group:

    alive/<rank>                what the rank does, and a count that grows with its signs of life
    wait/<group>/<round>        how many ranks of the group have arrived
    wait/<group>/<round>/<i>    set when the i-th of them has

A rank that has waited for REPORT_INTERVAL seconds looks up the first rank that is missing. Its own
phase then says whom it waits for, and it gives a sign of life whenever the missing rank has given
one. So the run goes on while that rank works, and if it hangs, so do those that wait for it: the
watchdog then names both (train.hang_timeout_minutes).
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import count

import torch.distributed as dist

from megatron_rpp.lifecycle import heartbeat

_FIRST_POLL, _LAST_POLL, _BACKOFF = 0.001, 0.25, 1.2
"""Seconds between polls: they grow by a fifth each time, up to a quarter of a second."""
REPORT_INTERVAL = 1.0
"""Seconds between two reports of a rank, and between two looks at the reports of another."""

_rounds: Counter[str] = Counter()
"""Number of meetings so far, by the name of the group."""


def store() -> dist.Store:
    """The store that all ranks of the world share."""
    return dist.distributed_c10d._get_default_store()


class Reports:
    """Reports this rank's signs of life to the store, at most once an interval and phase."""

    def __init__(self) -> None:
        self._store, self._key = store(), f"alive/{dist.get_rank()}"
        self._process, self._numbers = os.getpid(), count()
        self._last_report, self._name = 0.0, ""

    def start(self) -> None:
        heartbeat.current.followers.append(self._follow)
        self._follow()

    def stop(self) -> None:
        heartbeat.current.followers.remove(self._follow)

    def _follow(self) -> None:
        name, now = heartbeat.current.name, time.monotonic()
        if name == self._name and now - self._last_report < REPORT_INTERVAL:
            return
        if os.getpid() != self._process:  # a forked writer must not use the connection to the store
            return
        self._last_report, self._name = now, name
        with suppress(dist.DistError):  # the store is gone: the next collective says so
            self._store.set(self._key, f"{next(self._numbers)} {name}")


def wait_for_all(
    group: dist.ProcessGroup | None = None, *, idle: Callable[[], object] = lambda: None
) -> None:
    """Returns when all ranks of `group` (None: the world) have called it.

    Args:
        idle: called several times a second while this rank waits.
    """
    group = group or dist.group.WORLD
    assert group is not None
    if group.size() > 1:
        _Meeting(group).wait(idle)


class _Meeting:
    """One meeting of a group; made when this rank arrives."""

    def __init__(self, group: dist.ProcessGroup):
        self._store, self._ranks = store(), dist.get_process_group_ranks(group)
        _rounds[group.group_name] += 1
        number = _rounds[group.group_name]
        self._arrived, before = (f"wait/{group.group_name}/{n}" for n in (number, number - 1))
        self._keys = [f"{self._arrived}/{i}" for i in range(group.size())]
        self._store.set(self._keys[group.rank()], "")
        self._store.add(self._arrived, 1)
        self._old = [f"{before}/{group.rank()}", *([before] if group.rank() == 0 else [])]
        self._first = number == 1
        self._missing = 0  # all before it have arrived
        self._report = b""

    def wait(self, idle: Callable[[], object]) -> None:
        pause, looked, phase = _FIRST_POLL, time.monotonic(), heartbeat.current.name
        heartbeat.current.beat()
        while self._store.add(self._arrived, 0) < len(self._keys):
            idle()
            if time.monotonic() - looked > REPORT_INTERVAL:
                looked = time.monotonic()
                self._look()
            time.sleep(pause)
            pause = min(pause * _BACKOFF, _LAST_POLL)
        if not self._first:
            for key in self._old:  # every rank has left that meeting
                self._store.delete_key(key)
        heartbeat.current.rename(phase)
        heartbeat.current.beat()

    def _look(self) -> None:
        """Finds the first missing rank; gives a sign of life if that rank has given one."""
        start, keys = self._missing, self._keys
        self._missing = start + bisect_left(
            range(start, len(keys)), True, key=lambda i: not self._store.check(keys[start : i + 1])
        )
        if self._missing == len(keys):
            return
        rank, report = self._ranks[self._missing], b""
        if self._store.check([f"alive/{rank}"]):
            report = self._store.get(f"alive/{rank}")
        _, _, phase = report.decode().partition(" ")
        heartbeat.current.rename(f"waiting for rank {rank}" + (f", in {phase}" if phase else ""))
        if report != self._report:
            self._report = report
            heartbeat.current.beat()
