"""tools/make_task.py, run as users run it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.examples import open_examples
from megatron_rpp.data.prompts import fitting_rows
from megatron_rpp.data.tokenizer import load_tokenizer
from megatron_rpp.rewards import RewardSet

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_task.py"
spec = importlib.util.spec_from_file_location("make_task_tool", TOOL)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

RECIPE = """
task:
  name: chain_sum
  params: {min_terms: 2, max_terms: 3, min_digits: 1, max_digits: 2}
  train_size: 300
  eval_size: 20
data: {train: %s/train.jsonl, eval: %s/held/eval.jsonl, tokenizer: %s/sums.model}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("%s", str(tmp_path / "out")))
    return path


def make(recipe, *words: str) -> int:
    return tool.main(["--config", str(recipe), *words])


def contents(recipe) -> dict[str, bytes]:
    files = (path for path in (recipe.parent / "out").rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in files}


def test_a_trainer_can_use_what_it_writes(recipe):
    command = [sys.executable, TOOL, "--config", recipe]
    done = subprocess.run(command, cwd=recipe.parent, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done
    assert "300 training prompts" in done.stdout
    assert "the longest prompt has 11 tokens" in done.stdout
    out = recipe.parent / "out"
    tokenizer = load_tokenizer(out / "sums.model")
    for path, size in ((out / "train.jsonl", 300), (out / "held" / "eval.jsonl", 20)):
        examples, form = open_examples(path, "prompt", "label"), PromptFormat(tokenizer)
        assert len(fitting_rows(examples, form, limit=11, drop=False).rows) == size
        prompts = [form.tokens(example.prompt) for example in examples]
        answers = [tokenizer.decode(tokenizer.encode(e.label)) for e in examples]
        scores = RewardSet(["exact_match", "reasoning_gym"]).score(
            [tokenizer.decode(tokens) for tokens in prompts],
            answers,
            [e.label for e in examples],
            [e.metadata for e in examples],
        )
        assert scores.total == [2.0] * size


def test_the_same_settings_keep_the_files(recipe, capsys):
    assert make(recipe) == 0
    before = contents(recipe)
    assert sorted(before) == ["eval.jsonl", "sums.model", "task.json", "train.jsonl"]
    train = recipe.parent / "out" / "train.jsonl"
    made = train.stat().st_mtime_ns
    capsys.readouterr()
    assert make(recipe) == 0
    assert capsys.readouterr().out.count("unchanged, kept") == 3
    assert train.stat().st_mtime_ns == made and contents(recipe) == before


def test_a_missing_file_is_made_again_alike(recipe):
    make(recipe)
    before = contents(recipe)
    (recipe.parent / "out" / "sums.model").unlink()
    assert make(recipe) == 0
    assert contents(recipe) == before


def test_other_settings_need_overwrite(recipe, capsys):
    make(recipe)
    before = contents(recipe)
    assert make(recipe, "--task.train_seed", "9") == 2
    assert "task.train_seed was 1 and is 9" in capsys.readouterr().err
    assert contents(recipe) == before
    assert make(recipe, "--task.train_seed", "9", "--overwrite") == 0
    after = contents(recipe)
    assert json.loads(after["task.json"])["task"]["train_seed"] == 9
    assert after["train.jsonl"] != before["train.jsonl"]


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"other": "file"}'])
def test_a_task_json_of_something_else_is_not_overwritten(recipe, capsys, text):
    (recipe.parent / "out").mkdir()
    (recipe.parent / "out" / "task.json").write_text(text)
    assert make(recipe) == 2
    assert "its task.json is not one of this tool" in capsys.readouterr().err
    assert contents(recipe) == {"task.json": text.encode()}
    assert make(recipe, "--overwrite") == 0


def test_files_of_unknown_origin_need_overwrite(recipe, capsys):
    (recipe.parent / "out").mkdir()
    (recipe.parent / "out" / "train.jsonl").write_text("mine")
    assert make(recipe) == 2
    assert "there is no task.json" in capsys.readouterr().err
    assert contents(recipe) == {"train.jsonl": b"mine"}


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--task.name", "chian_sum"], "did you mean chain_sum"),
        (["--task.vocab_size", "12"], "task.vocab_size 12 pieces, raise it"),
        (["--task.params", "{digits: 2}"], "has no params ['digits']"),
    ],
)
def test_a_mistake_leaves_the_old_files_also_with_overwrite(recipe, capsys, words, problem):
    make(recipe)
    before = contents(recipe)
    assert make(recipe, *words, "--overwrite") == 2
    assert problem in capsys.readouterr().err
    assert contents(recipe) == before


def test_a_kill_between_two_files_is_repaired(recipe, monkeypatch):
    make(recipe)
    wanted = contents(recipe)
    make(recipe, "--task.train_seed", "9", "--overwrite")
    write, written = tool.write_atomic, []

    def killed(path, content):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tool, "write_atomic", killed)
        make(recipe, "--overwrite")
    assert written == ["task.json", "train.jsonl"]
    assert make(recipe) == 0
    assert contents(recipe) == wanted


def test_rows_carry_the_field_names_of_the_recipe(recipe):
    assert make(recipe, "--data.prompt_key", "question", "--data.label_key", "answer") == 0
    examples = open_examples(recipe.parent / "out" / "train.jsonl", "question", "answer")
    assert all(example.label for example in examples)


def test_paths_must_be_given_and_differ(recipe, capsys):
    assert make(recipe, "--data.eval", "") == 2
    assert "data.eval is empty" in capsys.readouterr().err
    train = str(recipe.parent / "out" / "train.jsonl")
    assert make(recipe, "--data.eval", train) == 2
    assert "must be different files" in capsys.readouterr().err
    assert not (recipe.parent / "out").exists()
