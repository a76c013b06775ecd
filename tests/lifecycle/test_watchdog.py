"""A rank that is stopped or stuck ends the run with a message that names it, and exit code 70."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpp.lifecycle import exit_codes
from tests.runs.test_config_errors import run_program
from tests.small_run import arguments, make_data

HANGS = {
    # SIGSTOP stops rank 1 shortly after its reward has started; rank 0 waits for the scores.
    "stopped": (
        "time.sleep(2); os.kill(os.getpid(), signal.SIGSTOP)",
        "rank 1 (process ",
        "in a reward function) is missing; in waiting for rank 1, in a reward function: rank 0",
    ),
    # It runs and never returns.
    "stuck": (
        "time.sleep(3600)",
        "in waiting for rank 1, in a reward function: rank 0",
        "in a reward function: rank 1",
    ),
}


@pytest.mark.parametrize("hang", HANGS)
def test_the_missing_rank_is_named(hang, tmp_path: Path):
    act, *expected = HANGS[hang]
    make_data(tmp_path)
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import os, signal, time\n\n\ndef score(prompts, *rest):\n"
        f"    if os.environ['RANK'] == '1' and len(prompts) == 16:\n        {act}\n"
        "    return [0.0] * len(prompts)\n"
    )
    # A replica has sixteen samples in a step and eight in an evaluation.
    settings = {
        "reward__functions": f"[{reward}:score]", "reward__workers": 0,
        "train__hang_timeout_minutes": 0.1,
    }  # fmt: skip
    results = run_program(2, arguments(tmp_path, tmp_path, **settings), ending=1)
    code, errors = results[0]
    assert code == exit_codes.HUNG == 70, errors
    assert "error: the run hangs, without progress for 6 s: " in errors
    assert all(text in errors for text in expected), errors
    stacks = (tmp_path / "logs/stacks/rank_00000.txt").read_text()
    assert "stages/reward.py" in stacks and "wait_for_all" in stacks
    if hang == "stuck":
        assert "in score" in (tmp_path / "logs/stacks/rank_00001.txt").read_text()


def test_a_rank_that_has_already_reported_the_hang_is_not_missing(tmp_path: Path):
    """Rank 1 was the first to notice, and its process has ended. Its last sign of life says so."""
    (tmp_path / "alive").mkdir()
    sign = {"beats": 9, "phase": "a reward function", "ending": True, "process": 1, "host": "h"}
    (tmp_path / "alive/rank_00001").write_text(json.dumps(sign))
    program = (
        "import time\nfrom megatron_rpp.lifecycle.watchdog import Watchdog\n"
        f"with Watchdog({str(tmp_path)!r}, rank=0, world=2, minutes=0.01).watching():\n"
        "    time.sleep(60)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert run.returncode == exit_codes.HUNG
    assert "missing" not in run.stderr
    assert "in start: rank 0; in a reward function: rank 1" in run.stderr
