"""If a save fails on one rank, the run ends on all ranks with one message and loses nothing.

Two real ranks. The failure is a real one: the kernel limits the size of files of rank 1.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.exit_codes import FAILED, SaveFailed
from tests.distributed import run_ranks
from tests.small_run import make_data
from tests.whole_runs import rows, train_run

FAULTY = 1  # the rank
LIMIT = 1000  # bytes, of a file
SETTINGS = {
    "train__steps": 2, "train__epochs": 1, "checkpoint__interval": 1, "model__layers": 2,
    "rollout__prompts_per_step": 4,
}  # fmt: skip
TOO_LARGE = os.strerror(errno.EFBIG)


@contextmanager
def small_files(rank: int, phase: str, count: int) -> Iterator[None]:
    """Limits the file size of rank FAULTY when it enters `phase` for the `count`-th time."""
    entered = []

    def listen(name: str) -> None:
        entered.extend([name] if name == phase else [])
        if rank == FAULTY and len(entered) == count:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))

    heartbeat.current.listeners.append(listen)
    try:
        yield
    finally:
        heartbeat.current.listeners.remove(listen)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def failing(base: Path, name: str, rank: int, phase: str, count: int, **settings) -> dict:
    """Describes how a run ended and what it left; then the same command resumes it."""
    run = base / name
    with small_files(rank, phase, count), pytest.raises(SaveFailed) as failed:
        train_run(base, run, **(SETTINGS | settings))
    dist.barrier()
    left = sorted(
        path.name
        for path in (run / "checkpoints").iterdir()
        if path.is_file() or any(path.iterdir())
    )
    newest = checkpoint.newest(run / "checkpoints").name
    train_run(base, run, **(SETTINGS | settings))
    steps = [row["step"] for row in rows(run / "logs/metrics.jsonl")]
    return {"message": str(failed.value), "code": failed.value.exit_code, "left": left,
            "newest": newest, "steps": steps}  # fmt: skip


def on_two_ranks(rank: int, base: Path) -> dict[str, dict]:
    halves, replicas = {"parallel__tensor": 2}, {"checkpoint__save_rollouts": "true"}
    return {
        "checkpoint": failing(base, "checkpoint", rank, "save: write", 2, **halves),
        "rollouts": failing(base, "rollouts", rank, "save rollouts", 3, **replicas),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict]]:
    base = tmp_path_factory.mktemp("ranks")
    make_data(base)
    return run_ranks(on_two_ranks, 2, base, base)


MESSAGES = {
    "checkpoint": "the checkpoint of step 2 could not be written to ",
    "rollouts": "the rollouts of step 2 could not be written to ",
}


@pytest.mark.parametrize("what", MESSAGES)
def test_one_rank_cannot_write(ranks, what):
    first, second = (result[what] for result in ranks)
    assert first == second and first["code"] == FAILED
    assert first["message"].startswith(MESSAGES[what])
    assert f"rank {FAULTY}: " in first["message"] and TOO_LARGE in first["message"]
    assert "rank 0" not in first["message"] and "make room" in first["message"]
    assert first["left"] == ["iter_0000001", checkpoint.POINTER]
    assert first["newest"] == "iter_0000001" and first["steps"] == [1, 2]
