"""Replicas that work for longer than a collective may take are waited for, while they progress."""

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


def work(rank: int, signs: bool) -> float:
    """The second replica works; how long ago the first had shown a sign of life when it is done."""
    with progress_wait.until_all_leaders_are_done() as alive:
        heartbeat.enter("work")
        end = time.monotonic() + (WORK if rank else 0)
        while time.monotonic() < end:
            time.sleep(0.05)
            if signs:
                alive()
    age = time.monotonic() - heartbeat.current.since
    assert groups.gather_objects(rank, dist.group.WORLD) == [0, 1]
    return age


def on_two_ranks(rank: int) -> tuple[list[float], bool]:
    progress_wait.SECONDS_BETWEEN_SIGNS = 0.2
    groups.start(tensor=1, pipeline=1, seed=1)
    dist.distributed_c10d._set_pg_timeout(LIMIT, dist.group.WORLD)
    ages = [work(rank, signs=True), work(rank, signs=False), work(rank, signs=True)]
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
    assert ages[0] < 1 and ages[2] < 1, "no sign of life while the other made progress"
    assert ages[1] > WORK - 0.5, "signs of life although nobody made progress"
    assert left == (False, True)
