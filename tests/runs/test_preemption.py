"""A run that is asked to stop saves at once, even inside a step, and resumes bit for bit.

The process sends itself real signals when it enters a phase; kills are SIGKILL.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.lifecycle import exit_codes, heartbeat
from megatron_rpp.runtime.checkpointing import Preempted
from tests.distributed import run_ranks
from tests.small_run import config_of
from tests.whole_runs import (
    TOLERANCE,
    VARIED,
    compare_rows,
    compare_weights,
    rows,
    same_bits,
    small_buckets,
    train_run,
    weights,
    with_whole_run,
)

# Two epochs of two mini-batches a step.
SETTINGS = {"train__steps": 2, "evaluation__interval": 1, "optimizer__eps": 1e-5}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of the data and of run "whole", which was not interrupted."""
    return with_whole_run(tmp_path_factory.mktemp("preemption"), **SETTINGS)


@contextmanager
def at(phase: str, count: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """Calls `act` when `phase` is entered for the `count`-th time; yields the entered phases."""
    entered: list[str] = []

    def listen(name: str) -> None:
        entered.append(name)
        if name == phase and entered.count(phase) == count:
            act()

    heartbeat.current.listeners.append(listen)
    try:
        yield entered
    finally:
        heartbeat.current.listeners.remove(listen)


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("iter_*"))


def check_equal(base: Path, run: str) -> None:
    same_bits(base / run, base / "whole", config_of(base, base / run, **VARIED), step=2)
    evaluated, whole = (
        [(row["step"], row["accuracy"]) for row in rows(base / name / "logs/evaluations.jsonl")]
        for name in (run, "whole")
    )
    assert evaluated == whole


# The signal comes when `phase` is entered for the `count`-th time; then the run leaves this
# checkpoint, if any. A step enters "update" once for the stage and once for each mini-batch; the run
# is evaluated before the first step, too. Rollouts and evaluations are abandoned.
CASES = {
    "in the first rollout": ("rollout", 1, ""),
    "in the second rollout": ("rollout", 2, "iter_0000001"),
    "in the evaluation before the first step": ("evaluation", 1, ""),
    "in the evaluation after the first step": ("evaluation", 2, "iter_0000000_minibatch_0004"),
    "in the second reward": ("reward", 2, "iter_0000001_done_2_reward"),
    "in the first step's update": ("update", 3, "iter_0000000_minibatch_0002"),
    "in the second step's update": ("update", 9, "iter_0000001_minibatch_0003"),
    "in the first step's last mini-batch": ("update", 5, "iter_0000000_minibatch_0004"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_resumes_inside_the_step(base, case):
    phase, count, left = CASES[case]
    number = signal.SIGUSR1 if "first" in case else signal.SIGTERM
    before = signal.getsignal(number)
    with at(phase, count, send(number)), pytest.raises(Preempted, match=f"{number.name}: saved"):
        train_run(base, base / case, **SETTINGS)
    assert names(base / case) == ([left] if left else [])
    assert signal.getsignal(number) == before
    with at("never", 1, print) as entered:
        train_run(base, base / case, **SETTINGS)
    if phase == "update" and "minibatch" in left:
        done = int(left[-4:])
        # Finished work is not repeated: only the remaining mini-batches of the first step run.
        assert entered[: entered.index("evaluation")].count("rollout") == 0
        assert entered[: entered.index("evaluation")].count("update") == 1 + 4 - done
    check_equal(base, case)


PPO = SETTINGS | {
    "algorithm__name": "ppo", "algorithm__gae_lambda": 0.9, "critic__optimizer__eps": 1e-5,
}  # fmt: skip


@pytest.fixture(scope="module")
def ppo(tmp_path_factory) -> Path:
    """As `base`, of PPO."""
    return with_whole_run(tmp_path_factory.mktemp("ppo"), **PPO)


# A step enters "critic" once for the stage and once for each of its four mini-batches.
PPO_CASES = {
    "before the critic's values": ("values", 1, "iter_0000000_minibatch_0000"),
    "in the critic's update": ("critic", 8, "iter_0000001_minibatch_0002"),
    "in the policy's update": ("update", 8, "iter_0000001_minibatch_0006"),
}


@pytest.mark.parametrize("case", PPO_CASES)
def test_a_stopped_run_of_ppo_resumes_inside_the_step(ppo, case):
    phase, count, left = PPO_CASES[case]
    with at(phase, count, send(signal.SIGTERM)), pytest.raises(Preempted, match="saved"):
        train_run(ppo, ppo / case, **PPO)
    assert names(ppo / case) == [left]
    train_run(ppo, ppo / case, **PPO)
    same_bits(ppo / case, ppo / "whole", config_of(ppo, ppo / case, **(VARIED | PPO)), step=2)


def test_deterministic_kernels_change_no_bit_on_a_cpu(base):
    train_run(base, base / "deterministic", train__deterministic="true", **SETTINGS)
    check_equal(base, "deterministic")


def test_a_second_stop_right_after_a_resume(base):
    """A requeued job may be stopped before it has done anything."""
    with at("update", 3, send(signal.SIGTERM)), pytest.raises(Preempted):
        train_run(base, base / "again", **SETTINGS)
    with pytest.raises(Preempted, match="the end of train.exit_duration_minutes: saved"):
        train_run(base, base / "again", train__exit_duration_minutes=0, **SETTINGS)
    train_run(base, base / "again", **SETTINGS)
    check_equal(base, "again")


def test_two_stops_in_one_step_always_leave_a_current_save(base):
    """The run stops after the rollout, just after the last token, then after the reward. At every
    moment of the second save either the older or the newer checkpoint is current."""
    run, first, second = base / "twice", "iter_0000000_done_1_rollout", "iter_0000000_done_2_reward"
    with at("save rollouts", 1, send(signal.SIGTERM)), pytest.raises(Preempted):
        train_run(base, run, checkpoint__save_rollouts="true", **SETTINGS)
    current = []

    def listen(phase: str) -> None:
        if phase.startswith("save: "):
            current.append(checkpoint.newest(run / "checkpoints").name)

    heartbeat.current.listeners.append(listen)
    with at("reward", 1, send(signal.SIGTERM)), pytest.raises(Preempted):
        train_run(base, run, **SETTINGS)
    heartbeat.current.listeners.remove(listen)
    # begin, write, manifest, rename, pointer | remove old ones
    assert current == [first] * 5 + [second] and names(run) == [first, second]
    train_run(base, run, **SETTINGS)
    check_equal(base, "twice")


def test_the_exit_code_of_preemption():
    assert Preempted("").exit_code == exit_codes.PREEMPTED == 75


@contextmanager
def other_data(base: Path) -> Iterator[None]:
    """The rows of the training file in reverse order, while the context is open."""
    path = base / "train.jsonl"
    before = path.read_text()
    path.write_text("".join(reversed(before.splitlines(keepends=True))))
    try:
        yield
    finally:
        path.write_text(before)


def test_a_step_with_other_prompts_starts_over(base, capsys):
    with at("update", 3, send(signal.SIGTERM)), pytest.raises(Preempted):
        train_run(base, base / "replaced", **SETTINGS)
    with other_data(base), at("never", 1, print) as entered:
        train_run(base, base / "replaced", **SETTINGS)
    assert "the data has other prompts than" in capsys.readouterr().out
    assert entered.count("rollout") == 2
    assert [row["step"] for row in rows(base / "replaced/logs/metrics.jsonl")] == [1, 2]


SAVE_ROLLOUTS = SETTINGS | {"checkpoint__save_rollouts": "true", "checkpoint__interval": 1}


def until_killed(rank: int, base: Path) -> None:
    with at("update", 7, send(signal.SIGKILL)):
        train_run(base, base / "stored", **SAVE_ROLLOUTS)


def test_saved_rollouts_are_used_after_a_kill(base, tmp_path):
    """The run is killed in the second step's update. With another temperature, or with other rows
    in the same file, the rollouts do not belong to the run."""
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(until_killed, 1, tmp_path, base)
    stored = base / "stored/checkpoints/rollouts"
    assert {path.name for path in stored.iterdir()} == {
        "step_0000001_reward",
        "step_0000001_rollout",
    }
    for name in ("changed", "other data"):
        shutil.copytree(base / "stored", base / name)
    with at("never", 1, print) as entered:
        train_run(base, base / "changed", rollout__temperature=0.9, **SAVE_ROLLOUTS)
    assert "rollout" in entered and "reward" in entered
    with other_data(base), at("never", 1, print) as entered:
        train_run(base, base / "other data", **SAVE_ROLLOUTS)
    assert "rollout" in entered and "reward" in entered
    with at("never", 1, print) as entered:
        train_run(base, base / "stored", **SAVE_ROLLOUTS)
    assert "rollout" not in entered and "reward" not in entered and "update" in entered
    assert not stored.exists()
    check_equal(base, "stored")


# The checkpoint that a kill in the first save leaves, and the step from which the run continues.
FIRST_SAVE = {"save: write": ("no checkpoint", 0), "save: pointer": ("iter_0000001", 1)}


def killed_in_the_first_save(rank: int, base: Path, case: str) -> None:
    with at(case, 1, send(signal.SIGKILL)):
        train_run(base, base / case, checkpoint__interval=1, **SETTINGS)


@pytest.mark.parametrize("case", FIRST_SAVE)
def test_a_kill_in_the_first_save(base, tmp_path, case):
    left, step = FIRST_SAVE[case]
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(killed_in_the_first_save, 1, tmp_path, base, case)
    directory = base / case / "checkpoints"
    assert (names(base / case) or ["no checkpoint"]) == [left]
    assert not (directory / checkpoint.POINTER).exists()
    with at("never", 1, print) as entered:
        train_run(base, base / case, checkpoint__interval=1, **SETTINGS)
    assert entered.count("rollout") == 2 - step
    assert not list(directory.glob(".saving_*"))
    check_equal(base, case)


def on_two_ranks(rank: int, base: Path) -> str:
    """Only rank 1 gets the signal, inside an update of two replicas, whose weights are not gathered
    yet; the run resumes as two pipeline stages."""
    settings = SETTINGS | {"train__steps": 2}
    act = send(signal.SIGTERM) if rank == 1 else (lambda: None)
    with small_buckets(), at("update", 8, act), pytest.raises(Preempted) as stopped:
        train_run(base, base / "dp2", parallel__overlap_param_gather="true", **settings)
    dist.barrier()
    left = names(base / "dp2")
    dist.barrier()
    train_run(base, base / "dp2", parallel__pipeline=2, **settings)
    return f"{left} {stopped.value}"


def test_a_stop_of_one_rank_resumes_on_another_layout(base, tmp_path):
    told = run_ranks(on_two_ranks, 2, tmp_path, base)
    assert told[0] == told[1]
    assert "['iter_0000001_minibatch_0002'] SIGTERM: saved in step 2 after 2 mini-" in told[0]
    own, whole = (rows(base / run / "logs/metrics.jsonl") for run in ("dp2", "whole"))
    assert compare_rows(own, whole).size <= TOLERANCE
    config = config_of(base, base / "dp2", **VARIED)
    final = [weights(config, base / run / "checkpoints/iter_0000002") for run in ("dp2", "whole")]
    deviation = compare_weights(*final)
    assert deviation.size <= TOLERANCE, deviation
