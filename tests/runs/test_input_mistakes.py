"""Mistakes in the user's files end the run with file and row, before any model is built.

Simpler mistakes are in test_config_errors.py, Hugging Face directories in tests/hf.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_rpp.config import Config
from megatron_rpp.conversion.dist_checkpoint import Checkpoint
from tests.data.hf_tokenizers import make_chatml
from tests.runs.test_config_errors import check_error, error_message
from tests.small_run import arguments, make_data
from tests.whole_runs import rows, train_run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The data of small runs, and broken variants of what a run reads."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    good = [json.dumps(row) for row in rows(folder / "train.jsonl")[:2]]
    lines = {
        "half": json.dumps({"prompt": "1 + 1 = \ud83d", "label": "2"}).encode(),
        "half_label": json.dumps({"prompt": "1 + 1 =", "label": "\udc00 2"}).encode(),
        "latin": '{"prompt": "caf\xe9", "label": "2"}'.encode("latin-1"),
        "digits": b'{"prompt": "1 + 1 =", "label": ' + b"7" * 5000 + b"}",
        "deep": b'{"prompt": "1 + 1 =", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "blank": b'{"prompt": "1 + 1 =", "label": " "}',
        "no_label": b'{"prompt": "1 + 1 ="}',
    }
    for name, line in lines.items():
        (folder / f"{name}.jsonl").write_bytes("\n".join(good).encode() + b"\n" + line + b"\n")
    for name in ("cut_off", "other", "text_id", "dangling"):
        make_chatml(folder / name)
    (folder / "cut_off/generation_config.json").write_text('{"eos_token_id": [2, ')
    (folder / "other/generation_config.json").write_text("[2, 0]")
    (folder / "text_id/generation_config.json").write_text('{"eos_token_id": "2"}')
    (folder / "dangling/generation_config.json").unlink()
    os.symlink("/gone/blob", folder / "dangling/generation_config.json")
    (folder / "latin.jinja").write_bytes(b"caf\xe9")
    (folder / "fails.jinja").write_text("{{ messages[0]['content'] + 1 / 0 }}")
    (folder / "latin.yaml").write_bytes(b"seed: caf\xe9")
    (folder / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (folder / "empty_folder").mkdir()
    return folder


CHAT = {"data__apply_chat_template": True, "model__vocab_size": 512}
MISTAKES = {
    "half a surrogate pair": (
        {"data__train": "DATA/half.jsonl"},
        "DATA/half.jsonl, line 3 holds \\ud83d alone, half of a surrogate pair",
    ),
    "half a pair in a label": (
        {"data__eval": "DATA/half_label.jsonl"},
        "DATA/half_label.jsonl, line 3 holds \\udc00 alone",
    ),
    "another encoding": (
        {"data__train": "DATA/latin.jsonl"},
        "DATA/latin.jsonl, line 3 is not JSON ('utf-8' codec can't decode byte 0xe9",
    ),
    "too long an integer": (
        {"data__train": "DATA/digits.jsonl"},
        "DATA/digits.jsonl, line 3 cannot be read (ValueError: Exceeds the limit (4300 digits)",
    ),
    "too deep": ({"data__train": "DATA/deep.jsonl"}, "DATA/deep.jsonl, line 3 is not JSON ("),
    "no label": (
        {"data__train": "DATA/no_label.jsonl"},
        "DATA/no_label.jsonl, line 3: reward function 'exact_match' needs a label, but this row",
    ),
    "no label held out": (
        {"data__eval": "DATA/no_label.jsonl", "reward__functions": "[math_verify]"},
        "DATA/no_label.jsonl, line 3: reward function 'math_verify' needs a label",
    ),
    "a blank gold": (
        {"data__train": "DATA/blank.jsonl", "reward__functions": "[math_verify]"},
        "DATA/blank.jsonl, line 3: reward function 'math_verify' needs an answer in the label, but",
    ),
    "no entry": (
        {"data__train": "DATA/no_label.jsonl", "reward__functions": "[reasoning_gym]"},
        "reward function 'reasoning_gym' needs ['answer', 'entry', 'params', 'task'] in the row's",
    ),
    "settings cut off": (
        {"data__tokenizer": "DATA/cut_off"},
        "DATA/cut_off/generation_config.json cannot be read (JSONDecodeError: ",
    ),
    "settings of another form": (
        {"data__tokenizer": "DATA/other"},
        "DATA/other/generation_config.json cannot be read (AttributeError: 'list' object",
    ),
    "an id that is a text": (
        {"data__tokenizer": "DATA/text_id"},
        "DATA/text_id/generation_config.json: eos_token_id is '2', it must be a whole number",
    ),
    "a link to nowhere": (
        {"data__tokenizer": "DATA/dangling"},
        "DATA/dangling/generation_config.json cannot be read (FileNotFoundError: ",
    ),
    "a folder without tokenizer": (
        {"data__tokenizer": "DATA/empty_folder"},
        "tokenizer DATA/empty_folder is not a directory of Hugging Face tokenizer files",
    ),
    "a template in another encoding": (
        {"data__tokenizer": "DATA/chat", "data__chat_template": "DATA/latin.jinja"},
        "data.chat_template DATA/latin.jinja cannot be read (UnicodeDecodeError: ",
    ),
    "a template that fails": (
        CHAT | {"data__tokenizer": "DATA/chat", "data__chat_template": "DATA/fails.jinja"},
        "DATA/eval.jsonl, line 1: the chat template refuses the messages",
    ),
    "a stop token of no tokenizer": (
        {"rollout__stop_token_ids": "[3, 41]"},
        "rollout.stop_token_ids has 41, but the tokenizer's ids are 0 .. 40: correct it",
    ),
    "a reward that leaves": (
        {"reward__functions": "[DATA/leaves.py:score]"},
        "DATA/leaves.py:score' cannot be imported (SystemExit: 0)",
    ),
    "weights of nowhere": (
        {"model__init_path": "DATA/empty_folder"},
        "no checkpoint at DATA/empty_folder: it holds neither .metadata nor a",
    ),
    "a run of nowhere": ({"checkpoint__load": "DATA/gone"}, "no checkpoint at DATA/gone: it holds"),
}


@pytest.fixture(scope="module", autouse=True)
def _chat(data):
    make_chatml(data / "chat")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_place(mistake, data, tmp_path, capsys):
    check_error(*MISTAKES[mistake], data, tmp_path, capsys)


def test_a_recipe_in_another_encoding(data, tmp_path, capsys):
    errors = error_message([*arguments(data, tmp_path), f"--config={data}/latin.yaml"], capsys)
    assert f"config file '{data}/latin.yaml': " in errors


def test_command_line_bytes_that_are_not_text(data, tmp_path, capsys):
    text = os.fsdecode(b"caf\xe9")
    errors = error_message([*arguments(data, tmp_path), f"--data.system_prompt={text}"], capsys)
    assert "data.system_prompt holds '\\udce9', which is not a character: write the text" in errors


def test_half_a_surrogate_pair_in_a_recipe(data, tmp_path, capsys):
    (data / "half.yaml").write_text('rollout: {stop: ["smile \\ud83d"]}\n')
    errors = error_message([*arguments(data, tmp_path), f"--config={data}/half.yaml"], capsys)
    assert "rollout.stop holds '\\ud83d', which is not a character: write the text" in errors


@pytest.fixture(scope="module")
def old(data, tmp_path_factory) -> Path:
    """The checkpoints of a run."""
    run = tmp_path_factory.mktemp("old")
    train_run(data, run, train__steps=1)
    return run / "checkpoints"


@pytest.mark.parametrize("damage", ["common state", "metadata.json", ".metadata"])
def test_a_damaged_checkpoint(damage, old, data, tmp_path, capsys):
    """It is found before a model is built, both as initial weights and to resume from."""
    shutil.copytree(old, tmp_path / "damaged")
    path = tmp_path / "damaged/iter_0000001"
    file = Checkpoint(path).common_file if damage == "common state" else path / damage
    file.write_bytes(file.read_bytes()[:20])
    named = file if damage == "common state" else path
    capsys.readouterr()
    for setting in ("model__init_path", "checkpoint__load"):
        argv = arguments(data, tmp_path / "new", **{setting: tmp_path / "damaged"})
        errors = error_message(argv, capsys)
        assert f"{named} " in errors and "choose another" in errors


@pytest.mark.parametrize("temperature", ["1e-40", "1e-9", "0.0009"])
def test_a_temperature_at_which_logits_lose_their_digits(temperature, data, tmp_path, capsys):
    errors = error_message(arguments(data, tmp_path, rollout__temperature=temperature), capsys)
    assert "rollout.temperature must be at least 0.001, got " in errors
    assert Config().rollout.temperature >= 0.001
