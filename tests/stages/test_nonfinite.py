"""If one rank finds a NaN, all ranks skip the update; too many skips in a row end the run. A NaN in
the log-probs ends the run at once.

Two real ranks form two replicas, or the two tensor-parallel halves of one. On one of them, hooks on
the real computation spoil a loss, a gradient or log-probs.
"""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rpp import train
from megatron_rpp.lifecycle.exit_codes import FAILED, RunFailure
from megatron_rpp.model import pipeline
from megatron_rpp.model.pipeline import finalize_model_grads
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime import run as runs
from megatron_rpp.runtime.inputs import load_inputs
from megatron_rpp.stages import logprobs, update
from tests.distributed import run_ranks
from tests.small_run import config_of, make_data
from tests.whole_runs import VARIED, layout, train_run

LAYOUTS = {"DP2": {}, "TP2": {"parallel__tensor": 2}}
SPOILED = 1  # the rank
SETTINGS = VARIED | {
    "train__epochs": 1, "train__minibatches": 2, "train__max_skipped_updates": 3,
    "rollout__prompts_per_step": 4,
    "rollout__samples_per_prompt": 2, "rollout__max_new_tokens": 3,
}  # fmt: skip


class Spoiler:
    """Spoils the loss, or the gradient of one parameter, of one rank in its next `left` updates.

    "sum": the gradient is spoiled after the sum over all ranks, as a broken reduction would do.
    """

    def __init__(self, run, kind: str, value: float, rank: int):
        self.value, self.left = value, 0
        self.mine = rank == SPOILED
        if kind == "gradient":
            next(run.policy.model.parameters()).register_hook(self.spoil)
        elif kind == "sum":
            pipeline.finalize_model_grads = self.finalize
        else:
            original = update.policy_loss
            update.policy_loss = lambda *args, **clip: self.spoil(original(*args, **clip))

    def spoil(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.mine or not self.left:
            return tensor
        self.left -= 1
        return tensor * self.value

    def finalize(self, wrapped, *args, **kwargs) -> None:
        finalize_model_grads(wrapped, *args, **kwargs)
        buffer = wrapped[0].buffers[0].grad_data
        buffer.copy_(self.spoil(buffer))


def weights(run) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in run.policy.model.parameters()])


def spoiled_steps(rank: int, data, kind: str, value: str, settings: dict) -> dict:
    """Runs steps with one of two updates spoiled, both, none, and all until the run ends.

    Returns rows, weights and messages.
    """
    original, said = update.policy_loss, []
    config = config_of(data, data / "run", **(SETTINGS | settings))
    with layout(config):
        run = runs.build(config, load_inputs(config), Console(False))
        run.console.log = said.append
        spoiler = Spoiler(run, kind, float(value), rank)
        found = {"weights": [weights(run)], "rows": [], "updates": []}
        for spoiled in (1, 2, 0):
            spoiler.left = spoiled
            row, _ = train.rl_step(run)
            run.advance(0)
            found["rows"].append(row)
            found["weights"].append(weights(run))
            found["updates"].append(run.policy.scheduler.num_steps)
        found["said"] = list(said)
        spoiler.left = 10
        with pytest.raises(RunFailure) as failure:
            for _ in range(2):
                train.rl_step(run)
                run.advance(0)
        found["failure"] = str(failure.value)
        found["weights"].append(weights(run))
    update.policy_loss, pipeline.finalize_model_grads = original, finalize_model_grads
    return found


CASES = [
    ("DP2", "loss", "nan"),
    ("DP2", "gradient", "inf"),
    ("TP2", "gradient", "nan"),
    ("DP2", "sum", "inf"),
]


def spoiled_logprobs(rank: int, data, value: float, call: int) -> tuple[str, int]:
    """Spoils the second replica's third sample with `value`; returns message and exit code.

    call: 1 = under the policy, 2 = under the reference.
    """
    original, calls = logprobs.response_logprobs, []

    def spoil(model, buffer, max_tokens, **settings):
        column = original(model, buffer, max_tokens, **settings)
        calls.append(1)
        if rank == SPOILED and len(calls) == call:
            column[buffer.response_offsets[2]] = value
        return column

    logprobs.response_logprobs = spoil
    with pytest.raises(RunFailure) as failure:
        train_run(data, data / f"{value} {call}", algorithm__kl_estimator="k3", **SETTINGS)
    logprobs.response_logprobs = original
    return str(failure.value), failure.value.exit_code


# The value, the call that returns it, and the nonfinite quantity that the message names. Sample 2
# of the second replica's four is sample 6 of the step. exp(200) is infinite in fp32.
LOGPROBS = {
    ("nan", 1): "the policy's log-probs on rank 1 have 1 value(s)",
    ("-inf", 2): "the reference's log-probs on rank 1 have 1 value(s)",
    ("200", 2): "the KL estimates (k3) on rank 1 have 1 value(s)",
}


def on_two_ranks(rank: int, data) -> dict:
    found = {case: spoiled_logprobs(rank, data, float(case[0]), case[1]) for case in LOGPROBS}
    return found | {case: spoiled_steps(rank, data, *case[1:], LAYOUTS[case[0]]) for case in CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    data = tmp_path_factory.mktemp("data")
    make_data(data)
    return run_ranks(on_two_ranks, 2, data, data)


@pytest.mark.parametrize("case", LOGPROBS, ids=str)
def test_logprobs_that_are_not_finite_end_the_run(ranks, case):
    (message, code), other = (result[case] for result in ranks)
    assert (message, code) == other and code == FAILED == 1
    assert message.startswith(LOGPROBS[case]), message
    assert "the first in sample 6 of the step, with the prompt 'State" in message
    assert "lower learning rate" in message


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


def cause_of(kind: str) -> str:
    one = f"the {kind} on rank {SPOILED}"
    return ("the norm of all ranks' gradients together" if kind == "sum" else one) + (
        " is NaN or infinite"
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_log_names_the_cause_and_the_rank(ranks, case):
    cause = cause_of(case[1])
    for result in ranks:
        first, second, third = result[case]["said"]
        assert first == f"step 1: update of the policy skipped, mini-batch 0 of epoch 0: {cause}"
        assert second.startswith("step 2") and third.startswith("step 2")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_run_ends_on_all_ranks_with_one_message(ranks, case):
    messages = {result[case]["failure"] for result in ranks}
    assert len(messages) == 1
    (message,) = messages
    assert message.startswith("3 updates in a row were skipped (train.max_skipped_updates)")
    assert cause_of(case[1]) in message
