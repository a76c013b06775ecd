"""A NaN on one rank makes all ranks skip that update alike, and too many in a row end the run.

Two real ranks, as two replicas and as the two tensor-parallel halves of one. On one of them a loss
or a gradient is spoiled, by hooks on the real computation.
"""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rpp import run as runs
from megatron_rpp import train
from megatron_rpp.console import Console
from megatron_rpp.failures import RunFailure
from megatron_rpp.inputs import load_inputs
from megatron_rpp.stages import update
from tests.distributed import run_ranks
from tests.small_run import config_of, make_data
from tests.whole_runs import VARIED, layout

LAYOUTS = {"DP2": {}, "TP2": {"parallel__tensor": 2}}
SPOILED = 1  # the rank
SETTINGS = VARIED | {
    "train__epochs": 1, "train__minibatches": 2, "train__max_skipped_updates": 3,
    "rollout__prompts_per_step": 4,
    "rollout__samples_per_prompt": 2, "rollout__max_new_tokens": 3,
}  # fmt: skip


class Spoiler:
    """Spoils the loss, or the gradient of one parameter, of one rank in its next `left` updates."""

    def __init__(self, run, kind: str, value: float, rank: int):
        self.value, self.left = value, 0
        self.mine = rank == SPOILED
        if kind == "gradient":
            next(run.policy.model.parameters()).register_hook(self.spoil)
        else:
            original = update.policy_loss
            update.policy_loss = lambda *args: self.spoil(original(*args))

    def spoil(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.mine or not self.left:
            return tensor
        self.left -= 1
        return tensor * self.value


def weights(run) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in run.policy.model.parameters()])


def spoiled_steps(rank: int, data, kind: str, value: str, settings: dict) -> dict:
    """Rows, weights and messages of: one update of two spoiled; both; none; all until the end."""
    original, said = update.policy_loss, []
    config = config_of(data, data / "run", **(SETTINGS | settings))
    with layout(config):
        run = runs.build(config, load_inputs(config), Console(False))
        run.console.say = said.append
        spoiler = Spoiler(run, kind, float(value), rank)
        found = {"weights": [weights(run)], "rows": [], "updates": []}
        for spoiled in (1, 2, 0):
            spoiler.left = spoiled
            row, _ = train.rl_step(run)
            run.state.step += 1
            found["rows"].append(row)
            found["weights"].append(weights(run))
            found["updates"].append(run.policy.scheduler.num_steps)
        found["said"] = list(said)
        spoiler.left = 10
        with pytest.raises(RunFailure) as failure:
            for _ in range(2):
                train.rl_step(run)
        found["failure"] = str(failure.value)
        found["weights"].append(weights(run))
    update.policy_loss = original
    return found


CASES = [
    ("DP2", "loss", "nan"),
    ("DP2", "gradient", "inf"),
    ("TP2", "gradient", "nan"),
]


def on_two_ranks(rank: int, data) -> dict:
    return {case: spoiled_steps(rank, data, *case[1:], LAYOUTS[case[0]]) for case in CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    data = tmp_path_factory.mktemp("data")
    make_data(data)
    return run_ranks(on_two_ranks, 2, data, data)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_skipped_updates_are_counted_and_left_out(ranks, case):
    for result in ranks:
        found = result[case]
        assert [row["policy/skipped_updates"] for row in found["rows"]] == [1, 2, 0]
        assert all(math.isfinite(value) for row in found["rows"] for value in row.values())
        one, both, none = found["rows"]
        assert one["policy/grad_norm"] > 0 and one["policy/entropy"] > 0
        for tag in ("policy/loss", "policy/grad_norm", "policy/entropy", "policy/ratio_max"):
            assert both[tag] == 0, tag
        assert none["policy/grad_norm"] > 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_skipped_update_changes_nothing(ranks, case):
    for result in ranks:
        found = result[case]
        start, one, both, none, end = found["weights"]
        assert not torch.equal(start, one) and torch.equal(one, both)
        assert not torch.equal(both, none) and torch.equal(none, end)
        assert found["updates"] == [1, 1, 3]  # of the schedule


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_log_names_the_cause_and_the_rank(ranks, case):
    _, kind, _ = case
    cause = f"the {kind} on rank {SPOILED} is NaN or infinite"
    for result in ranks:
        first, second, third = result[case]["said"]
        assert first == f"step 1: update skipped, mini-batch 0 of epoch 0: {cause}"
        assert second.startswith("step 2") and third.startswith("step 2")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_run_ends_alike_on_all_ranks(ranks, case):
    messages = {result[case]["failure"] for result in ranks}
    assert len(messages) == 1
    (message,) = messages
    assert message.startswith("3 updates in a row were skipped (train.max_skipped_updates)")
    assert f"the {case[1]} on rank {SPOILED}" in message
