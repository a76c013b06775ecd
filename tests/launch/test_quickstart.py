"""How many processes launch/quickstart.sh starts, and on which layout, by the GPUs of the machine.

The interpreter, install.sh and torchrun.sh are programs of the test that write down their words.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Answers the question for the number of GPUs and ignores every other program.
PYTHON = '#!/bin/sh\n[ "$1" != -c ] || echo {gpus}\n'


def launches(folder: Path, *words: str, gpus: int, **env: str) -> list[str]:
    """The command lines that torchrun.sh gets: those of sft and of train."""
    (folder / "launch").mkdir()
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "launch/quickstart.sh", folder / "launch")
    (folder / "launch/install.sh").touch()
    (folder / "launch/torchrun.sh").write_text(f'echo "$*" >> "{folder}/launches"\n')
    python = folder / ".venv/bin/python"
    python.write_text(PYTHON.format(gpus=gpus))
    python.chmod(0o755)
    subprocess.run(
        ["bash", folder / "launch/quickstart.sh", *words],
        cwd=folder, env={"PATH": os.environ["PATH"], **env}, check=True, timeout=60,
    )  # fmt: skip
    return (folder / "launches").read_text().splitlines()


@pytest.mark.parametrize("gpus", [0, 2, 8])
def test_two_processes_on_the_layout_of_the_recipe(gpus, tmp_path):
    lines = launches(tmp_path, gpus=gpus)
    assert [line.split()[:3] for line in lines] == [
        ["--nproc-per-node", "2", program] for program in ("sft", "train")
    ]
    assert not any("--parallel" in line for line in lines)


def test_one_process_on_a_single_gpu(tmp_path):
    for line in launches(tmp_path, gpus=1):
        assert line.startswith("--nproc-per-node 1 ") and " --parallel.tensor 1 " in line


def test_what_the_user_sets_is_kept(tmp_path):
    for line in launches(tmp_path, "--parallel.context", "2", gpus=1, NPROC="4"):
        assert line.startswith("--nproc-per-node 4 ") and "--parallel.tensor" not in line
        assert " --parallel.context 2" in line
