"""A barrier over the replicas that lasts as long as any of them makes progress.

A collective ends the run after groups.COLLECTIVE_TIMEOUT, but the rewards of one replica may take
longer than that. Ranks that are done therefore poll the store of the process group. While any
leader reports progress, the waiting ranks send heartbeats to their watchdogs. If no leader does,
the watchdog ends the run (train.hang_timeout_minutes).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.parallel import groups

_PROGRESS_KEY = "work/progress"
_FIRST_POLL, _LAST_POLL, _BACKOFF = 0.001, 0.25, 1.2
"""Seconds between polls: they grow by a fifth each time, up to a quarter of a second."""
REPORT_INTERVAL = 1.0
"""Seconds between two reports of progress."""

_round = 0


@contextmanager
def leader_barrier() -> Iterator[Callable[[], None]]:
    """Holds every rank at the end of the context until the leaders of all replicas have reached it.

    Every rank enters the context. Yields a function that a leader calls when its work progresses.
    """
    global _round
    _round += 1
    store = dist.distributed_c10d._get_default_store()
    finished_key = f"work/{_round}"
    try:
        yield _ProgressReporter(store).report
    finally:
        if groups.is_replica_leader():
            store.add(finished_key, 1)
    heartbeat.enter("waiting for all rewards")
    _wait(store, finished_key, groups.data_size())
    if groups.is_main() and _round > 2:
        store.delete_key(f"work/{_round - 2}")  # no rank reads this key any more


class _ProgressReporter:
    """Tells the waiting ranks that this leader makes progress, at most once an interval."""

    def __init__(self, store: dist.Store):
        self._store, self._last_report = store, 0.0

    def report(self) -> None:
        heartbeat.current.beat()
        if time.monotonic() - self._last_report > REPORT_INTERVAL:
            self._last_report = time.monotonic()
            self._store.add(_PROGRESS_KEY, 1)


def _wait(store: dist.Store, finished_key: str, leaders: int) -> None:
    """Polls until all leaders have finished; sends a heartbeat when one has reported progress."""
    pause, reports, checked = _FIRST_POLL, store.add(_PROGRESS_KEY, 0), time.monotonic()
    while store.add(finished_key, 0) < leaders:
        if time.monotonic() - checked > REPORT_INTERVAL:
            checked, before = time.monotonic(), reports
            reports = store.add(_PROGRESS_KEY, 0)
            if reports != before:
                heartbeat.current.beat()
        time.sleep(pause)
        pause = min(pause * _BACKOFF, _LAST_POLL)
