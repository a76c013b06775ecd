"""Runs that start from and end in Hugging Face directories, on one rank and on two.

The model is a small random Qwen3 with the tokenizer of the digit sums. A run exports the policy of
its last checkpoint. The export loads in transformers and differs from the initial model.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rpp import sft, train
from megatron_rpp.config import cli
from megatron_rpp.conversion.convert import to_hf, to_megatron
from megatron_rpp.hf.safetensors_in import Weights
from tests.distributed import run_ranks
from tests.hf.models import save
from tests.small_run import arguments, make_data
from tests.whole_runs import (
    TOLERANCE,
    compare_rows,
    compare_weights,
    rows,
    run_program,
    train_run,
)

# The settings of small_run.py that describe another model than the directory does.
NOT_OURS = (
    "model__layers",
    "model__hidden",
    "model__ffn_hidden",
    "model__heads",
    "model__kv_heads",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Data, a Qwen3 in `qwen3`, and the run "alone" of two steps from it to `alone/hf`."""
    base = tmp_path_factory.mktemp("hf-run")
    make_data(base)
    save(base, "qwen3", seed=4, vocab_size=77, num_key_value_heads=2)
    hf_run(base, "alone")
    return base


def hf_run(base, run, **settings):
    left_out = dict.fromkeys(NOT_OURS, None)
    settings = {"model__hf_path": base / "qwen3", "optimizer__eps": 1e-5} | settings
    export_to = {"checkpoint__export_hf": base / run / "hf"}
    return train_run(base, base / run, **(left_out | export_to | settings))


def exported(path):
    files = Weights(path)
    return {name: files.read(name).clone() for name in files.shapes}


@pytest.mark.parametrize("program", [train, sft])
def test_the_directory_is_checked_once(base, tmp_path, monkeypatch, program):
    listed, opened = Weights._listed, []

    def counted(weights):
        opened.append(weights.directory)
        return listed(weights)

    monkeypatch.setattr(Weights, "_listed", counted)
    left_out = dict.fromkeys(NOT_OURS, None)
    words = arguments(base, tmp_path, model__hf_path=base / "qwen3", **left_out)
    run_program(program.main, [*words, "--dry-run"])
    assert opened == [base / "qwen3"]


def on_two_ranks(rank, base):
    hf_run(base, "tp2", parallel__tensor=2)
    hf_run(base, "pp2", parallel__pipeline=2)


def test_a_run_loads_and_exports_hugging_face(base, tmp_path):
    final, initial = exported(base / "alone/hf"), exported(base / "qwen3")
    assert final.keys() == initial.keys()
    assert compare_weights(final, initial).size > 1e-4
    to_hf(base / "alone/checkpoints", tmp_path / "again")
    assert compare_weights(exported(tmp_path / "again"), final).size == 0
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base / "alone/hf", local_files_only=True)
    assert torch.equal(model.model.norm.weight, final["model.norm.weight"])


def test_a_run_without_steps_left_still_exports(base):
    """The run starts from the last checkpoint of another directory; its own is still empty."""
    hf_run(base, "nothing left", checkpoint__load=base / "alone/checkpoints")
    again = exported(base / "nothing left/hf")
    assert compare_weights(again, exported(base / "alone/hf")).size == 0


def test_other_layouts_end_with_the_same_policy(base):
    run_ranks(on_two_ranks, 2, base, base, timeout=240)
    alone = rows(base / "alone/logs/metrics.jsonl")
    for run in ("tp2", "pp2"):
        deviation = compare_rows(rows(base / run / "logs/metrics.jsonl"), alone)
        assert deviation.size < TOLERANCE, deviation
        deviation = compare_weights(exported(base / run / "hf"), exported(base / "alone/hf"))
        assert deviation.size < TOLERANCE, deviation


def test_the_architecture_is_read_from_a_converted_checkpoint(base, tmp_path):
    to_megatron(base / "qwen3", tmp_path / "megatron")
    words = arguments(base, tmp_path, **dict.fromkeys(NOT_OURS, None))
    model = cli.parse([*words, f"--model.init_path={tmp_path / 'megatron'}"]).config.model
    assert (model.head_dim, model.qk_norm, model.vocab_size, model.rope_theta) == (
        12,
        True,
        77,
        500,
    )
    printed = cli.parse([*words, f"--model.hf_path={base / 'qwen3'}", "--model.layers=4"])
    assert replace(printed.config.model, hf_path=None) == replace(model, init_path=None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--model.layers=3", "model.layers is 3, but the model in .*qwen3 has 4: leave it out"),
        ("--model.max_length=4096", "reads at most 512 tokens: lower it"),
        ("--model.init_path=elsewhere", "are both set"),
        ("--model.hf_path=nowhere", "nowhere has no config.json"),
    ],
)
def test_settings_that_contradict_the_directory_are_errors(
    base, tmp_path, capsys, setting, message
):
    words = arguments(base, tmp_path, **dict.fromkeys(NOT_OURS, None))
    with pytest.raises(SystemExit) as ended:
        cli.parse([*words, f"--model.hf_path={base / 'qwen3'}", setting])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
