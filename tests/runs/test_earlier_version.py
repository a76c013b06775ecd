"""A checkpoint that version 0.1 (commit eff9303) wrote inside a step loads with its rollouts.

tests/runs/written_by_0.1 is from `small_run` with SETTINGS, stopped after the reward of step 2.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.small_run import make_data
from tests.whole_runs import compare_rows, rows, train_run

WRITTEN = Path(__file__).with_name("written_by_0.1")
SETTINGS = {
    "model__layers": 2, "model__hidden": 8, "model__ffn_hidden": 8, "model__heads": 2,
    "model__kv_heads": 1, "rollout__prompts_per_step": 4, "rollout__samples_per_prompt": 2,
    "train__epochs": 1, "train__minibatches": 1, "train__steps": 3,
}  # fmt: skip


def test_a_checkpoint_of_version_0_1_resumes_exactly(tmp_path, capsys):
    make_data(tmp_path)
    train_run(tmp_path, tmp_path / "whole", **SETTINGS)
    shutil.copytree(WRITTEN, tmp_path / "run/checkpoints")
    capsys.readouterr()
    train_run(tmp_path, tmp_path / "run", **SETTINGS)
    output = capsys.readouterr().out
    assert "resumed at step 1 and 0 mini-batches of 3" in output
    assert "starts over" not in output, "the rollouts of step 2 were not read"
    ours, whole = (rows(tmp_path / name / "logs/metrics.jsonl")[-2:] for name in ("run", "whole"))
    assert [row["step"] for row in ours] == [2, 3]
    # The processor that wrote the checkpoint may round differently.
    assert compare_rows(ours, whole[-2:]).size < 1e-3
    assert ours[0]["reward/mean"] == pytest.approx(whole[0]["reward/mean"])
