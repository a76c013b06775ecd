"""Waiting for work of uneven length, such as rewards, without a collective.

A collective ends the run after groups.COLLECTIVE_TIMEOUT, and one replica's scorers may well take
longer. So who is done looks into the store of the process group now and then. As long as anybody
makes progress, whoever waits shows signs of life to its watchdog; where nobody does, the watchdog
ends the run (train.hang_timeout_minutes).
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Callable, Iterator

import torch.distributed as dist

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.parallel import groups

_PROGRESS = "work/progress"
_SHORTEST, _LONGEST, _GROWTH = 0.001, 0.25, 1.2
"""Seconds between two looks, and how they grow: a wait is a fifth longer than it has to be, or a
quarter of a second."""
SECONDS_BETWEEN_SIGNS = 1.0

_round = 0


@contextmanager
def until_all_leaders_are_done() -> Iterator[Callable[[], None]]:
    """Nobody leaves the context before the leaders of all replicas have come to its end.

    Every rank enters it. Yields what a leader calls when its work has made progress.
    """
    global _round
    _round += 1
    store = dist.distributed_c10d._get_default_store()
    finished = f"work/{_round}"
    try:
        yield _Signs(store).show
    finally:
        if groups.is_replica_leader():
            store.add(finished, 1)
    heartbeat.enter("waiting for all rewards")
    _wait(store, finished, groups.data_size())
    if groups.is_main() and _round > 2:
        store.delete_key(f"work/{_round - 2}")  # nobody looks at it any more


class _Signs:
    """Of progress, for those that wait; not more often than they are of use."""

    def __init__(self, store: dist.Store):
        self._store, self._last = store, 0.0

    def show(self) -> None:
        heartbeat.current.beat()
        if time.monotonic() - self._last > SECONDS_BETWEEN_SIGNS:
            self._last = time.monotonic()
            self._store.add(_PROGRESS, 1)


def _wait(store: dist.Store, counter: str, count: int) -> None:
    pause, signs, looked = _SHORTEST, store.add(_PROGRESS, 0), time.monotonic()
    while store.add(counter, 0) < count:
        if time.monotonic() - looked > SECONDS_BETWEEN_SIGNS:
            looked, before = time.monotonic(), signs
            signs = store.add(_PROGRESS, 0)
            if signs != before:
                heartbeat.current.beat()
        time.sleep(pause)
        pause = min(pause * _GROWTH, _LONGEST)
