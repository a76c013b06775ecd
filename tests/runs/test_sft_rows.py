"""The warm start checks the rows of its data before any work: it refuses or drops bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rpp import sft, train
from megatron_rpp.data import supervised
from megatron_rpp.runtime.inputs import load_inputs, with_fitting_rows
from tests.runs.test_sft import SETTINGS, log
from tests.small_run import arguments, config_of, make_data
from tests.whole_runs import rows, run_program


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("rows")
    make_data(base)
    return base


BAD_LABELS = {
    "none": ({"prompt": "1 + 1 ="}, "line 2: the row has no label.*set data.label_key"),
    "empty": ({"prompt": "1 + 1 =", "label": ""}, "line 2: the row has no label"),
    # 13 tokens of prompt at most, 32 of context: the rest is the label's and end-of-sequence.
    "too long": (
        {"prompt": "1 + 1 =", "label": "1 + " * 20},
        "line 2: prompt and label have .* tokens.*model.max_length.* 32",
    ),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_a_row_without_a_usable_label_is_an_error(base, tmp_path, kind):
    row, message = BAD_LABELS[kind]
    good = rows(base / "train.jsonl")[0]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(content) + "\n" for content in (good, row)))
    with pytest.raises(ValueError, match=message) as raised:
        run_program(sft.main, arguments(base, tmp_path, **SETTINGS, data__train=path))
    assert str(path) in str(raised.value)
    assert not (tmp_path / "sft/metrics.jsonl").exists()


def test_a_row_too_long_with_its_label_is_dropped_if_configured(base, tmp_path, capsys):
    """Its prompt alone fits. The run equals the run on a file without the row."""
    good = rows(base / "train.jsonl")[:20]
    kept, more = (tmp_path / name for name in ("kept.jsonl", "more.jsonl"))
    kept.write_text("".join(json.dumps(row) + "\n" for row in good))
    long, _ = BAD_LABELS["too long"]
    more.write_text("".join(json.dumps(row) + "\n" for row in [*good[:7], long, *good[7:]]))
    drop = {"sft__steps": 2, "data__overlong_prompts": "drop"}
    for path in (kept, more):
        run_program(
            sft.main,
            arguments(base, tmp_path / path.stem, **(SETTINGS | drop), data__train=path),
        )
    said = capsys.readouterr().out
    assert "data: 20 prompts, 16 held out, 0 dropped as too long" in said
    assert "data: 20 prompts, 16 held out, 1 dropped as too long" in said
    ours, theirs = ([row["sft/loss"] for row in log(tmp_path, run)] for run in ("more", "kept"))
    assert ours == theirs
    only = tmp_path / "only.jsonl"
    only.write_text(json.dumps(long) + "\n")
    with pytest.raises(ValueError, match="only.jsonl, line 1 on, no row fits model.max_length 32"):
        run_program(sft.main, arguments(base, tmp_path, **(SETTINGS | drop), data__train=only))


def test_labels_are_checked_once(base, monkeypatch):
    """Later ranks and starts on the same files read the result from the row cache."""
    config = config_of(base, base / "two", **SETTINGS, data__cache_dir=base / "cache")
    inputs = load_inputs(config)
    with_fitting_rows(config, inputs)
    monkeypatch.setattr(supervised, "sft_example", None)  # nobody may call it
    with_fitting_rows(config, inputs)
    longer = config_of(base, base / "two", **SETTINGS, data__cache_dir=base / "cache",
                       model__max_length=64)  # fmt: skip
    with pytest.raises(TypeError):
        with_fitting_rows(longer, inputs)


def test_the_warm_start_ignores_the_divisibility_of_rollouts(base, tmp_path, monkeypatch):
    """Three replicas do not divide the prompts of a step. The warm start ignores that and reports
    the missing label; training reports the divisibility before the ranks join."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 1 ="}) + "\n")
    words = arguments(base, tmp_path, **SETTINGS, data__train=path)
    with pytest.raises(ValueError, match="the row has no label"):
        sft.main(words)
    with pytest.raises(ValueError, match="prompts_per_step 8 is not divisible .* size 3"):
        train.main(words)
