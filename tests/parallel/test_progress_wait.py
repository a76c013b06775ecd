"""The barrier waits for a replica that works longer than a collective may take, if it progresses."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.parallel import groups, progress_wait
from tests.distributed import run_ranks

LIMIT = timedelta(seconds=1)  # of a collective
WORK = 2.5  # seconds


def work(rank: int, reports: bool) -> float:
    """The second replica works; returns the age of this rank's last heartbeat when it is done."""
    with progress_wait.leader_barrier() as report_progress:
        heartbeat.enter("work")
        end = time.monotonic() + (WORK if rank else 0)
        while time.monotonic() < end:
            time.sleep(0.05)
            if reports:
                report_progress()
    age = time.monotonic() - heartbeat.current.since
    assert groups.gather_objects(rank, dist.group.WORLD) == [0, 1]
    return age


def on_two_ranks(rank: int) -> tuple[list[float], tuple[bool, bool]]:
    progress_wait.REPORT_INTERVAL = 0.2
    groups.start(tensor=1, pipeline=1, seed=1)
    dist.distributed_c10d._set_pg_timeout(LIMIT, dist.group.WORLD)
    ages = [work(rank, reports=True), work(rank, reports=False), work(rank, reports=True)]
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    left = store.check(["work/1"]), store.check(["work/3"])
    time.sleep(WORK if rank else 0)
    if rank == 0:
        with pytest.raises(RuntimeError, match="[Tt]imed out"):
            dist.barrier()
    return ages, left


def test_a_slow_replica_is_waited_for(tmp_path):
    (ages, left), _ = run_ranks(on_two_ranks, 2, tmp_path)
    assert ages[0] < 1 and ages[2] < 1, "no heartbeat while the other replica made progress"
    assert ages[1] > WORK - 0.5, "heartbeats although no replica made progress"
    assert left == (False, True)
