"""The programs answer before torch is imported if no model is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import arguments, make_data

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


@pytest.mark.parametrize(
    "program", ["megatron_rpp.train", "megatron_rpp.sft", "megatron_rpp.reward_model"]
)
def test_the_programs(program):
    answer = run(program, "--help")
    assert answer.returncode == 0 and "--rollout.max_new_tokens" in answer.stdout, answer.stderr
    printed = run(program, "--print-config", "--optimizer.lr", "3e-6")
    assert printed.returncode == 0 and "lr: 3.0e-06" in printed.stdout, printed.stderr
    mistake = run(program, "--optimizer.rl", "1")
    assert mistake.returncode == 2, mistake.stderr
    assert mistake.stderr.startswith("error: unknown key 'optimizer.rl'"), mistake.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick_answers")
    make_data(folder)
    rows = (folder / "train.jsonl").read_text()
    (folder / "malformed.jsonl").write_text(rows + '{"prompt": 5\n')
    (folder / "long.jsonl").write_text(rows + '{"prompt": "%s", "label": "1"}\n' % ("1 + " * 90))
    return folder


MISTAKES = {
    "train__steps": (0, "train.steps must be at least 1"),
    "data__train": ("missing.jsonl", "missing.jsonl is not a file"),
    "data__eval": ("malformed.jsonl", "malformed.jsonl, line 201 is not JSON"),
    "data__tokenizer": ("eval.jsonl", "eval.jsonl is not a SentencePiece model"),
    "model__vocab_size": (8, "more than model.vocab_size 8"),
    "reward__functions": ("[nonsense]", "unknown reward function 'nonsense'"),
    "rollout__stop_token_ids": ("[9999]", "rollout.stop_token_ids has 9999"),
    "logging__dir": ("eval.jsonl", "cannot be written"),
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_a_mistake_that_needs_no_model_is_refused(data, tmp_path, setting):
    value, message = MISTAKES[setting]
    if isinstance(value, str) and "jsonl" in value:
        value = data / value
    answer = run("megatron_rpp.train", *arguments(data, tmp_path, **{setting: value}))
    assert answer.returncode == 2 and message in answer.stderr, answer.stderr


def test_a_row_that_is_too_long_is_refused_by_both_programs(data, tmp_path):
    words = arguments(data, tmp_path, data__train=data / "long.jsonl")
    for program in ("megatron_rpp.train", "megatron_rpp.sft", str(ROOT / "tools/preflight.py")):
        answer = run(program, *words)
        assert answer.returncode == 2 and "long.jsonl, line 201" in answer.stderr, answer.stderr


@pytest.mark.parametrize("tool", ["benchmark", "chaos", "gpu_acceptance", "preflight", "report"])
def test_the_tools(tool):
    answer = run(str(ROOT / f"tools/{tool}.py"), "--help")
    assert answer.returncode == 0 and "usage:" in answer.stdout.lower(), answer.stderr
