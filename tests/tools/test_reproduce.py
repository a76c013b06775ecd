"""Two of the three comparisons, at the scale of --quick: their runs, the document, the pictures; and what
the command line refuses. `python tools/reproduce.py run --quick` runs all three."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reproduction.drawing import PANELS
from reproduction.protocol import EXPERIMENTS, ROOT

TOOL = ROOT / "tools/reproduce.py"
QUICK = ("run", "speed", "length", "--quick")
"""Both tasks, all algorithms, the learned reward, several processes. The third comparison adds nothing but
further combinations of them."""


def reproduce(run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *words], capture_output=True, text=True, timeout=1500,
        env=os.environ | {"RUN": str(run)},
    )  # fmt: skip


def rows_of(run: Path, name: str) -> list[dict]:
    path = run / "quick/reproduction" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(value: object) -> list[float]:
    """All numbers in a row."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def test_comparisons_run_and_are_reported(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "docs").rglob("*")}
    done = reproduce(tmp_path, *QUICK)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "quick/reproduction.md").read_text()
    experiments = [experiment for experiment in EXPERIMENTS if experiment.name in QUICK]
    for experiment in experiments:
        rows = rows_of(tmp_path, experiment.name)
        assert {row["algorithm"] for row in rows} == set(experiment.algorithms)
        for row in rows:
            assert [point["step"] for point in row["curve"]] == [0, 1, 2]
            assert row["steps"] == 2 and all(map(math.isfinite, numbers(row)))
            assert f"`{row['algorithm']}`" in section_of(page, experiment.name)
    assert PANELS.keys() == {experiment.name for experiment in EXPERIMENTS}
    for experiment in experiments:
        picture = (tmp_path / f"quick/reproduction/{experiment.name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 300_000
    assert {row["model"] for row in rows_of(tmp_path, "models")} == {
        "warm start, sums",
        "warm start, steps",
        "reward model, steps",
    }
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "docs").rglob("*")} == before

    again = reproduce(tmp_path, *QUICK)
    assert again.returncode == 0 and "seed1" not in again.stdout, "finished runs stay as they are"


def section_of(page: str, name: str) -> str:
    """The text between the markers of an experiment."""
    return page.partition(f"<!-- results: {name} -->")[2].partition("<!-- end -->")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "maths"], "no experiment 'maths', only speed, length, math"),
        (["run", "--seeds", "101"], "this seed chooses the learning rates"),
        (["run", "--seeds", "1", "1"], "different seeds"),
    ],
)
def test_what_is_refused(tmp_path, words, message):
    done = reproduce(tmp_path, *words)
    assert done.returncode == 2 and message in done.stderr
    assert list(tmp_path.iterdir()) == []
