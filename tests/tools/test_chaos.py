"""A run with fourteen kills, one in every phase, equals an undisturbed run bit for bit.

It is a run of PPO, which has the phases of REINFORCE++ and those of its critic.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHAOS = Path(__file__).resolve().parents[2] / "tools/chaos.py"
KILLS = 14


def test_killed_runs_end_as_if_nothing_had_happened():
    command = [sys.executable, str(CHAOS), "--kills", str(KILLS), "--algorithm.name", "ppo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{KILLS} kills, " in done.stdout and done.stdout.endswith(": bit for bit equal\n")
    phases = done.stdout.split("kills by phase: ")[1].splitlines()[0].split(", ")
    assert len(phases) == KILLS and all(phase.endswith(" 1") for phase in phases)
