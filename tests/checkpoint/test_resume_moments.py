"""A checkpoint restores Adam's moments and the schedule; see test_resume.py for whole runs."""

from __future__ import annotations

import torch

from megatron_rpp import train
from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config import CheckpointConfig
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime.inputs import load_inputs
from megatron_rpp.runtime.policy import build_policy
from megatron_rpp.runtime.run import assemble, megatron_engine
from tests.small_run import config_of, make_data
from tests.whole_runs import VARIED, layout

# The learning rate changes in every step, so the test notices a schedule that starts over.
SETTINGS = {
    "train__epochs": 1,
    "optimizer__warmup_steps": 3,
    "optimizer__decay_steps": 12,
    "optimizer__eps": 1e-5,
    "algorithm__kl_coef": 0,
}


def moments(policy) -> list[torch.Tensor]:
    """Returns step, first and second moment of every parameter, in the optimizer's order."""
    (part,) = policy.optimizer.chained_optimizers
    states = [
        part.optimizer.state[parameter]
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]
    return [state[name].clone() for state in states for name in ("step", "exp_avg", "exp_avg_sq")]


def own_weights(policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.model.parameters()]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_the_moments_of_adam_come_back(tmp_path):
    """One more step from the restored state equals the next step of the first policy."""
    make_data(tmp_path)
    settings = VARIED | SETTINGS
    config = config_of(tmp_path, tmp_path, **settings)
    inputs = load_inputs(config)

    def step(policy, state: RunState) -> None:
        engine = megatron_engine(config, policy, inputs)
        run = assemble(config, inputs, Console(False), policy=policy, engine=engine)
        run.state = state
        train.rl_step(run)

    with layout(config):
        first, resumed, without = (
            build_policy(config_of(tmp_path, tmp_path, seed=seed, **settings), config.optimizer, 41)
            for seed in (1, 2, 3)
        )
        step(first, RunState())
        saved = RunState(step=1, prompts_seen=8, accuracy=0.25, kl_factor=1.5)
        settings = CheckpointConfig(dir=str(tmp_path), keep=1)
        path = checkpoint.save(first, saved, settings).publish()
        assert not equal(own_weights(first), own_weights(resumed))
        state = checkpoint.resume(resumed, path)
        assert state == saved
        before = moments(first)
        assert equal(moments(resumed), before) and any(value.any() for value in before[1::3])
        assert equal(own_weights(resumed), own_weights(first))
        checkpoint.load_weights(without.model, path)
        for policy in (first, resumed, without):
            step(policy, state)
        assert not equal(moments(first), before)
        assert equal(moments(resumed), moments(first))
        assert equal(own_weights(resumed), own_weights(first))
        assert not equal(own_weights(without), own_weights(first)), "the weights alone suffice"
