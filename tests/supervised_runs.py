"""What the runs of sft.py and reward_model.py must both survive."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rpp.runtime.checkpointing import Preempted
from tests.runs.test_preemption import at, send


def killed() -> None:
    """Ends the run without saving anything."""
    raise KeyboardInterrupt


def interrupt_and_finish(
    run: Callable[[], object], phase: str, *, after_abandoning: Callable[[], None] = lambda: None
) -> None:
    """Runs to the end in four parts. The run evaluates after step 6 and saves every four steps.

    It is killed in step 7, after the checkpoint of step 4, asked to stop in the evaluation after step 6,
    which is abandoned, and asked to stop in step 10.

    Args:
        run: starts the run or goes on with it.
        phase: the name of its steps.
        after_abandoning: called after the second part.
    """
    with at(phase, 7, killed), pytest.raises(KeyboardInterrupt):
        run()
    stopped = pytest.raises(Preempted, match="SIGTERM: saved in step 6 after 1 mini-batches")
    with at("evaluation", 1, send(signal.SIGTERM)) as entered, stopped:
        run()
    assert entered.count(phase) == 2
    after_abandoning()
    stopped = pytest.raises(Preempted, match="SIGTERM: saved after step 10")
    with at(phase, 4, send(signal.SIGTERM)) as entered, stopped:
        run()
    assert entered.index("evaluation") < entered.index(phase)
    run()


def without_times(rows: list[dict]) -> list[dict]:
    """Rows of metrics without what differs between any two runs."""
    return [{tag: row[tag] for tag in row if not tag.startswith("time/")} for row in rows]


def left_alone(folder: Path, run: Callable[[], object]) -> None:
    """Asserts that a run changes no file in `folder`."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    run()
    for path, changed in before.items():
        assert path.stat().st_mtime_ns == changed
