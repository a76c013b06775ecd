"""Rewards over ranks: each sample is scored once, and a failure on one replica stops all ranks.

The reward functions themselves are tested in tests/rewards/.
"""

from __future__ import annotations

from ast import literal_eval
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_rpp.data.sampler import prompt_indices
from megatron_rpp.rewards import RewardError
from tests.distributed import run_ranks
from tests.small_run import make_data
from tests.whole_runs import rows, train_run

# A user's file. It records every sample that it scores and fails on the prompt in TRIGGER.
REWARD = """
from pathlib import Path

TRIGGER = Path(__file__).with_name("trigger.txt").read_text()

def noted(prompts, responses, labels, metadata):
    lines = [f"{prompt}|{response!r}\\n" for prompt, response in zip(prompts, responses)]
    with open(Path(__file__).with_name("seen.txt"), "a") as file:
        file.write("".join(lines))
    return [len(response) / 10 for response in responses]

def not_a_number(prompts, responses, labels, metadata):
    return [float("nan") if prompt == TRIGGER else 0.5 for prompt in prompts]

def raising(prompts, responses, labels, metadata):
    if TRIGGER in prompts:
        raise KeyError("no such unit")
    return [0.5] * len(prompts)

def hanging(prompts, responses, labels, metadata):
    while TRIGGER in prompts:
        pass
    return [0.5] * len(prompts)
"""
FAILURES = ("not_a_number", "raising")
SEED, PROMPTS, SAMPLES, HELD_OUT = 1234, 8, 4, 16
LAYOUTS = {"TP2": {"parallel__tensor": 2}, "PP2": {"parallel__pipeline": 2}, "DP2": {}}


def train_one_step(base: Path, name: str, function: str, **settings) -> None:
    train_run(
        base, base / name, seed=SEED, train__steps=1, rollout__prompts_per_step=PROMPTS,
        rollout__samples_per_prompt=SAMPLES,
        reward__workers=2, reward__timeout_score=-1.5,
        **(settings | {"reward__functions": f"[{base}/reward.py:{function}]"}),
    )  # fmt: skip


def on_two_ranks(rank: int, base: Path) -> dict:
    """The samples seen by the reward under each layout, and the messages of its failures."""
    results = {}
    for name, settings in LAYOUTS.items():
        train_one_step(base, name, "noted", **settings)
        dist.barrier()
        results[name] = (base / "seen.txt").read_text().splitlines()
        dist.barrier()
        if rank == 0:
            (base / "seen.txt").unlink()
        dist.barrier()
    train_one_step(base, "hanging", "hanging", reward__timeout=3.0)
    for function in FAILURES:
        with pytest.raises(RewardError) as failed:
            train_one_step(base, function, function)
        results[function] = str(failed.value)
    return results


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("rewards")
    make_data(base)
    prompts = [row["prompt"] for row in rows(base / "train.jsonl")]
    step = [prompts[index] for index in prompt_indices(0, PROMPTS, size=len(prompts), seed=SEED)]
    trigger = step[-2]  # of the second replica alone, and not held out
    assert step.count(trigger) == 1
    (base / "trigger.txt").write_text(trigger)
    (base / "reward.py").write_text(REWARD)
    return base


@pytest.fixture(scope="module")
def ranks(base, tmp_path_factory) -> list[dict]:
    return run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("ranks"), base)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_sample_is_scored_once(ranks, base, name):
    """Held-out prompts are scored before and after the step, the step's samples in between."""
    seen = ranks[0][name]
    assert len(seen) == HELD_OUT + PROMPTS * SAMPLES + HELD_OUT
    held_out = [row["prompt"] for row in rows(base / "eval.jsonl")]
    asked = [line.partition("|")[0] for line in seen]
    assert all(asked.count(prompt) == 2 for prompt in held_out)
    trained = set(asked) - set(held_out)
    assert sorted(asked.count(prompt) for prompt in trained) == [SAMPLES] * PROMPTS


def test_the_samples_are_the_same_on_every_layout(ranks):
    samples = [sorted(ranks[0][name][HELD_OUT:-HELD_OUT]) for name in ("TP2", "PP2")]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_mean_in_the_log_is_that_of_the_scores(ranks, base, name):
    (row,) = rows(base / name / "logs/metrics.jsonl")
    held_out = {row["prompt"] for row in rows(base / "eval.jsonl")}
    lines = [line.partition("|") for line in ranks[0][name]]
    scores = [len(literal_eval(text)) / 10 for prompt, _, text in lines if prompt not in held_out]
    assert row["reward/mean"] == pytest.approx(sum(scores) / len(scores), rel=1e-6)
    assert 0 < row["reward/mean"] < 1


@pytest.mark.parametrize("function", FAILURES)
def test_a_failure_on_one_replica_stops_every_rank_and_shows_the_sample(ranks, base, function):
    messages = [result[function] for result in ranks]
    assert messages[0] == messages[1]
    assert f"reward.py:{function}' " in messages[0]
    lines = messages[0].splitlines()
    trigger = (base / "trigger.txt").read_text()
    problem = {
        "not_a_number": "gave the score nan, not a finite number",
        "raising": "raised KeyError: 'no such unit'",
    }[function]
    assert problem in lines[0]
    # The second replica holds prompts 4 .. 7; the trigger is the third of them.
    assert lines[1] == "sample 8 of 16:" and lines[2] == f"  prompt:   {trigger!r}"
    assert lines[3].startswith("  response: ") and lines[4].startswith("  label: ")


def test_a_scorer_that_hangs_costs_its_samples_alone(ranks, base):
    """One prompt's samples, on one of two replicas, get the default score; the run continues."""
    (row,) = rows(base / "hanging/logs/metrics.jsonl")
    assert row["reward/timeouts"] == SAMPLES
    share = 1 / PROMPTS
    assert row["reward/mean"] == pytest.approx(0.5 * (1 - share) - 1.5 * share)
