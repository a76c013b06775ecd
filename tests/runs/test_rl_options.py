"""Options of the algorithm follow their equations in the loop: estimators for comparison, the
adaptive KL coefficient, and importance weights for a rollout engine with different log-probs.

Steps on one real rank are compared with the oracle of tests/algorithms.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rpp import train
from megatron_rpp.reporting.console import Console
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.runtime import run as runs
from megatron_rpp.runtime.inputs import load_inputs
from tests.algorithms import oracle
from tests.small_run import config_of, make_data
from tests.whole_runs import VARIED, layout, rows, train_run

STEP = VARIED | {"train__minibatches": 1, "train__epochs": 1, "train__steps": 1}
SHIFTS = (0.0, math.log(3), -math.log(3), math.log(1.5))


class ShiftedEngine:
    """The in-process engine, but its log-probs are too low by SHIFTS in turn."""

    def __init__(self, engine):
        self.engine = engine

    def generate(self, *args, **kwargs):
        shifts = (SHIFTS[i % len(SHIFTS)] for i in range(10**9))
        return [
            replace(found, logprobs=[value - next(shifts) for value in found.logprobs])
            for found in self.engine.generate(*args, **kwargs)
        ]


class Step(dict):
    """One step: its row, its buffer, and the weights of the policy after it."""

    buffer: RolloutBuffer
    weights: list[torch.Tensor]


def one_step(data: Path, folder: Path, shifted: bool = False, **settings) -> Step:
    config = config_of(data, folder, **(STEP | settings))
    run = runs.build(config, load_inputs(config), Console(False))
    if shifted:
        run.engine = ShiftedEngine(run.engine)
    row, buffer = train.rl_step(run)
    step = Step(row)
    step.buffer = buffer
    step.weights = [parameter.detach().clone() for parameter in run.policy.model.parameters()]
    return step


CASES = {
    "plain": {},
    "grpo": {"algorithm__name": "grpo", "algorithm__kl_coef": 0},
    "rloo": {"algorithm__name": "rloo", "algorithm__kl_loss_coef": 0.1},
    "taken": {"algorithm__old_logprobs": "rollout"},
}
SHIFTED = {"none": {}, "taken": CASES["taken"]} | {
    kind: {"algorithm__rollout_correction": kind, "algorithm__rollout_correction_max": 2.0}
    for kind in ("cap", "mask")
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def steps(data, tmp_path_factory) -> dict[str, Step]:
    """The same step with each option, from the same weights and the same samples."""
    folder = tmp_path_factory.mktemp("steps")
    with layout(config_of(data, folder)):
        found = {name: one_step(data, folder, **case) for name, case in CASES.items()}
        for kind, case in SHIFTED.items():
            found[f"shifted {kind}"] = one_step(data, folder, shifted=True, **case)
    return found


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_estimators_for_comparison(steps, name):
    step, buffer = steps[name], steps[name].buffer
    scores, ids = buffer.scores.double().numpy(), buffer.group_ids.numpy()
    expected = oracle.group_baseline(scores, ids, name)
    on_tokens = np.repeat(expected, buffer.response_lengths.numpy())
    np.testing.assert_allclose(buffer.advantages, on_tokens, rtol=1e-6, atol=1e-7)
    assert np.abs(expected).max() > 0.1 and step["policy/grad_norm"] > 0
    assert step["advantage/var"] == pytest.approx(np.var(on_tokens), rel=1e-5)
    # The KL is a loss term, with its own coefficient, or there is no reference at all.
    assert ("kl/k2" in step) == (name == "rloo") and step.get("kl/coef", 0.1) == 0.1


def test_log_probs_of_the_rollout_save_a_pass_and_change_nothing(steps):
    """The two ways to compute them differ only in the rounding of fp32 sums."""
    taken, plain = steps["taken"], steps["plain"]
    assert torch.equal(taken.buffer.old_logprobs, taken.buffer.rollout_logprobs)
    measured = ("time/", "throughput/", "memory/", "rollout/logprob_abs_diff")
    for tag in (tag for tag in plain if not tag.startswith(measured)):
        assert taken[tag] == pytest.approx(plain[tag], rel=1e-4, abs=1e-6), tag
    for ours, theirs in zip(taken.weights, plain.weights):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # one step of Adam is 1e-3
    assert taken["rollout/logprob_abs_diff_max"] == 0 < plain["rollout/logprob_abs_diff_max"]
    assert plain["policy/ratio_max"] == pytest.approx(1, abs=1e-6)
    assert steps["shifted taken"]["policy/ratio_max"] == pytest.approx(3, rel=1e-4)


def weights_of(kind: str, buffer: RolloutBuffer) -> np.ndarray:
    old, behaviour = (x.double().numpy() for x in (buffer.old_logprobs, buffer.rollout_logprobs))
    if kind == "none":
        return np.exp(old - behaviour)
    return oracle.rollout_weights(old, behaviour, kind, 2.0)


def test_the_metrics_show_a_shifted_engine(steps):
    """The ratios are 1, 3, 1/3, 1.5 in turn."""
    step = steps["shifted none"]
    weights = weights_of("none", step.buffer)
    np.testing.assert_allclose(weights[:4], [1, 3, 1 / 3, 1.5], rtol=1e-4)
    share = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
    assert step["rollout/ess"] == pytest.approx(share, rel=1e-5) and share < 0.8
    assert step["rollout/logprob_abs_diff_max"] == pytest.approx(math.log(3), rel=1e-4)
    assert step["rollout/correction_clipped_share"] == 0
    assert step.buffer.rollout_weights is None


@pytest.mark.parametrize(("kind", "clipped"), [("cap", [1]), ("mask", [1, 2])])
def test_weights_are_those_of_the_oracle(steps, kind, clipped):
    step = steps[f"shifted {kind}"]
    expected = weights_of(kind, step.buffer)
    np.testing.assert_allclose(step.buffer.rollout_weights, expected, rtol=1e-6)
    share = np.mean([i % len(SHIFTS) in clipped for i in range(len(expected))])
    assert step["rollout/correction_clipped_share"] == pytest.approx(share)


@pytest.mark.parametrize("kind", ["cap", "mask"])
def test_weights_multiply_the_loss_of_their_tokens(steps, kind):
    """At the first update the ratio of the policies is 1: the loss is the mean of -w A."""
    step = steps[f"shifted {kind}"]
    advantages = step.buffer.advantages.double().numpy()
    expected = -np.mean(weights_of(kind, step.buffer) * advantages)
    assert step["policy/loss"] == pytest.approx(expected, abs=1e-6)
    assert abs(expected) > 1e-3
    assert steps["shifted none"]["policy/loss"] == pytest.approx(0, abs=1e-6)


def test_only_a_correction_changes_the_update(steps):
    """The samples are the same, and nothing else in the step uses the engine's log-probs."""
    plain, none = steps["plain"].weights, steps["shifted none"].weights
    assert all(torch.equal(mine, other) for mine, other in zip(plain, none, strict=True))
    for kind in ("cap", "mask"):
        other = steps[f"shifted {kind}"].weights
        assert not all(torch.equal(mine, its) for mine, its in zip(none, other, strict=True))


def test_adaptive_kl_coefficient(data, tmp_path):
    """In three steps the factor follows from the logged KL by the equation of the paper."""
    settings = {
        "train__steps": 4, "algorithm__kl_controller": "adaptive", "algorithm__kl_target": 0.01,
        "algorithm__kl_horizon": 100, "algorithm__kl_estimator": "k3", "algorithm__kl_coef": 0.05,
    }  # fmt: skip
    train_run(data, tmp_path, **(STEP | settings))
    logged = rows(tmp_path / "logs/metrics.jsonl")
    expected = [0.05]
    for row in logged[:-1]:
        error = np.clip(row["kl/k3"] / 0.01 - 1, -0.2, 0.2)
        expected.append(expected[-1] * (1 + error * 32 / 100))
    assert [row["kl/coef"] for row in logged] == pytest.approx(expected, rel=1e-12)
    # The policy starts as its own reference (KL 0), and ends beyond the target.
    assert expected[1] < expected[0] and expected[-1] > expected[-2]
