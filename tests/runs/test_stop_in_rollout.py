"""A rollout that takes long is abandoned within seconds of a signal to any one rank.

The rollout is slowed down on purpose: to its end it would take at least 14 seconds. A replica that has
finished early waits for the others; it is told, and it tells the others, as well. The run leaves what
was there before the step, and resumes bit for bit.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.rollout.batch import Batch
from megatron_rpp.runtime.checkpointing import Preempted
from tests.distributed import run_ranks
from tests.small_run import config_of, make_data
from tests.whole_runs import VARIED, same_bits, train_run

TOKENS, PAUSE = 12, 1.2  # seconds a token
AFTER, SOON = 1.5, 10.0  # seconds: the signal comes; all ranks have stopped
SETTINGS = {
    "train__steps": 2, "train__epochs": 1, "train__minibatches": 1, "evaluation__interval": 1, "checkpoint__interval": 1, "model__max_length": 64,
    "model__layers": 4, "rollout__max_new_tokens": TOKENS, "rollout__min_new_tokens": TOKENS,
    "rollout__prompts_per_step": 4, "rollout__samples_per_prompt": 2,
    "train__max_tokens_per_microbatch": 256,
}  # fmt: skip


@contextmanager
def slow(slow_ranks: set[int], victim: int) -> Iterator[None]:
    """Rollouts are slow on `slow_ranks`, and `victim` gets a signal soon after one has begun."""
    original, rank, started = Batch.sample, dist.get_rank(), threading.Event()

    def sample(batch):
        in_rollout = heartbeat.current.name == "rollout"  # and not in the evaluation before it
        if in_rollout and rank == victim and not started.is_set():
            started.set()
            threading.Timer(AFTER, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if in_rollout and rank in slow_ranks:
            time.sleep(PAUSE)
        original(batch)

    Batch.sample = sample
    try:
        yield
    finally:
        Batch.sample = original


def stopped(base: Path, slow_ranks: set[int], victim: int, **layout) -> tuple[float, list[str]]:
    """Starts or resumes the run, whose next rollout is abandoned. Returns the seconds from the
    begin of that rollout, and the checkpoints that are there."""
    begin: list[float] = []

    def listen(name: str) -> None:
        if name == "rollout":
            begin.append(time.monotonic())

    heartbeat.current.listeners.append(listen)
    with slow(slow_ranks, victim), pytest.raises(Preempted, match="SIGTERM: saved after step"):
        train_run(base, base / "run", **SETTINGS, **layout)
    heartbeat.current.listeners.remove(listen)
    seconds = time.monotonic() - begin[0]
    dist.barrier()
    return seconds, sorted(path.name for path in (base / "run/checkpoints").glob("iter_*"))


def on_ranks(rank: int, base: Path, layout: dict, slow_ranks: set[int], victims: list[int]) -> list:
    train_run(base, base / "whole", **SETTINGS, **layout)
    found = [stopped(base, slow_ranks, victims[0], **layout)]
    # One step, and the rest of the run as before.
    train_run(base, base / "run", **SETTINGS | {"train__steps": 1}, **layout)
    found.append(stopped(base, slow_ranks, victims[1], **layout))
    train_run(base, base / "run", **SETTINGS, **layout)
    return found


# World size, layout, the ranks whose decoding is slow, and who gets the first and second signal.
LAYOUTS = {
    "TP2": (2, {"parallel__tensor": 2}, {0, 1}, [0, 1]),
    "PP2": (2, {"parallel__pipeline": 2}, {0, 1}, [0, 1]),
    "PP2 of 2 chunks each": (
        2,
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
        {0, 1},
        [0, 1],
    ),
    "CP2, one part of the replica finishes early": (2, {"parallel__context": 2}, {1}, [0, 1]),
    "DP2, one replica finishes early": (2, {}, {1}, [0, 1]),
    "TP2 x DP2, one replica finishes early": (4, {"parallel__tensor": 2}, {0, 1}, [3, 1]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_slow_rollout_is_abandoned(name, tmp_path):
    world, layout, slow_ranks, victims = LAYOUTS[name]
    make_data(tmp_path)
    for found in run_ranks(on_ranks, world, tmp_path, tmp_path, layout, slow_ranks, victims):
        assert max(seconds for seconds, _ in found) < SOON
        assert [left for _, left in found] == [[], ["iter_0000001"]]
    config = config_of(tmp_path, tmp_path / "run", **(VARIED | SETTINGS))
    same_bits(tmp_path / "run", tmp_path / "whole", config, step=2)
