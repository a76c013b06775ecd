"""Degenerate steps: all rewards are equal, or all responses are truncated."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.small_run import config_of, make_data
from tests.whole_runs import VARIED, compare_weights, rows, train_run, weights

SETTINGS = {
    "train__steps": 2, "train__epochs": 1, "checkpoint__interval": 1, "model__layers": 2,
    "rollout__prompts_per_step": 4, "rollout__min_new_tokens": 6, "rollout__max_new_tokens": 6,
}  # fmt: skip
EQUAL = {"reward__functions": "[tests.stages.test_degenerate:equal]", "algorithm__kl_coef": 0}


def equal(prompts, responses, labels, metadata) -> list[float]:
    return [0.7] * len(prompts)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("degenerate")
    make_data(base)
    return base


def log(base: Path, name: str) -> list[dict]:
    found = rows(base / name / "logs/metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2]
    assert all(math.isfinite(value) for row in found for value in row.values())
    assert all(row["response/truncated_share"] == 1 for row in found)
    assert all(row["policy/skipped_updates"] == 0 for row in found)
    return found


def change(base: Path, name: str) -> float:
    """The largest change of a weight in the second step."""
    config = config_of(base, base / name, **(VARIED | SETTINGS))
    steps = (base / name / f"checkpoints/iter_000000{step}" for step in (1, 2))
    return compare_weights(*(weights(config, path) for path in steps)).size


@pytest.mark.parametrize("name", ["reinforce++", "reinforce++_baseline", "grpo", "rloo"])
def test_equal_rewards_of_truncated_responses_change_nothing(base, name):
    """Without variance every algorithm gives advantages of 0: no division by 0, no update."""
    train_run(base, base / name, algorithm__name=name, **(SETTINGS | EQUAL))
    for row in log(base, name):
        assert row["reward/mean"] == pytest.approx(0.7) and row["reward/std"] == 0
        assert row["reward/zero_variance_share"] == 1
        assert row["advantage/var"] == pytest.approx(0, abs=1e-12)
        assert row["policy/grad_norm"] == 0 and row["policy/loss"] == 0
    assert change(base, name) == 0


def test_the_policy_learns_from_truncated_responses(base):
    train_run(base, base / "cut off", **SETTINGS)
    assert all(row["policy/grad_norm"] > 0 for row in log(base, "cut off"))
    assert change(base, "cut off") > 0
