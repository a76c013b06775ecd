"""The programs answer before torch is imported if no model is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import runpy, sys
program, *sys.argv[1:] = sys.argv[1:]
code = None
try:
    if program.endswith(".py"):
        sys.path.insert(0, program.rpartition("/")[0])
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__")
except SystemExit as end:
    code = end.code
assert not {"torch", "megatron", "matplotlib"} & sys.modules.keys(), "imported before the answer"
sys.exit(code)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("program", ["megatron_rpp.train", "megatron_rpp.sft"])
def test_the_programs(program):
    answer = run(program, "--help")
    assert answer.returncode == 0 and "--rollout.max_new_tokens" in answer.stdout, answer.stderr
    printed = run(program, "--print-config", "--optimizer.lr", "3e-6")
    assert printed.returncode == 0 and "lr: 3.0e-06" in printed.stdout, printed.stderr
    mistake = run(program, "--optimizer.rl", "1")
    assert mistake.returncode == 2, mistake.stderr
    assert mistake.stderr.startswith("error: unknown key 'optimizer.rl'"), mistake.stderr


@pytest.mark.parametrize("tool", ["benchmark", "chaos", "preflight", "report"])
def test_the_tools(tool):
    answer = run(str(ROOT / f"tools/{tool}.py"), "--help")
    assert answer.returncode == 0 and "usage:" in answer.stdout.lower(), answer.stderr
