"""The barrier waits for a rank that works longer than a collective may take, if it progresses."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch.distributed as dist

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.parallel import groups, progress_wait
from tests.distributed import run_ranks

LIMIT = timedelta(seconds=1)  # of a collective
WORK = 2.5  # seconds


class Wait(NamedTuple):
    """What a rank saw in one wait."""

    longest: float
    """Seconds without a sign of life, at most."""
    phases: set[str]
    idle_calls: int


def work(rank: int, *, reports: bool) -> None:
    """The last rank works."""
    heartbeat.enter("work")
    end = time.monotonic() + (WORK if rank == dist.get_world_size() - 1 else 0)
    while time.monotonic() < end:
        time.sleep(0.05)
        if reports:
            heartbeat.current.beat()


def wait(group: dist.ProcessGroup | None = None) -> Wait:
    ages, phases = [], set()

    def look() -> None:
        ages.append(time.monotonic() - heartbeat.current.since)
        phases.add(heartbeat.current.name)

    progress_wait.wait_for_all(group, idle=look)
    assert heartbeat.current.name == "work", "the phase is not what it was before the wait"
    return Wait(max(ages, default=0.0), phases, len(ages))


def on_ranks(rank: int) -> tuple[Wait, Wait, Wait]:
    """The last rank works while the others wait: with signs of life, without any, and while one of
    the others waits for it in a group of two."""
    progress_wait.REPORT_INTERVAL = 0.2
    groups.start(tensor=1, pipeline=1, seed=1)
    pair = dist.new_group([1, 2])
    dist.distributed_c10d._set_pg_timeout(LIMIT, dist.group.WORLD)
    found = []
    for reports, in_pair in ((True, False), (False, False), (True, True)):
        work(rank, reports=reports)
        if in_pair and rank > 0:
            wait(pair)
        found.append(wait())
        assert groups.gather_objects(rank, dist.group.WORLD) == [0, 1, 2]
    store = progress_wait.store()
    left = [store.check([f"wait/{dist.group.WORLD.group_name}/{i}/{rank}"]) for i in (1, 2, 3)]
    assert left == [False, False, True], "keys of earlier rounds are left"
    time.sleep(0 if rank == 0 else WORK)
    if rank == 0:
        with pytest.raises(RuntimeError, match="[Tt]imed out"):
            dist.barrier()
    return tuple(found)


def test_a_slow_rank_is_waited_for_and_named(tmp_path):
    ranks = run_ranks(on_ranks, 3, tmp_path)
    for reporting, silent, _ in ranks[:2]:
        assert reporting.longest < 1.5, "no sign of life while the other rank made progress"
        assert silent.longest > WORK - 1, "signs of life although no rank made progress"
        assert "waiting for rank 2, in work" in reporting.phases & silent.phases
        assert reporting.idle_calls >= 10
    chained = ranks[0][2]
    assert chained.longest < 1.5
    assert "waiting for rank 1, in waiting for rank 2, in work" in chained.phases
