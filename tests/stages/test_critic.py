"""PPO's critic in the loop: its values, returns and metrics against the oracle; its warm-up; and what
happens if its loss is not finite. Steps on one real rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rpp import train
from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.model import initialization
from megatron_rpp.model.language_model import chunks
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime import run as runs
from megatron_rpp.runtime import startup
from megatron_rpp.runtime.inputs import load_inputs
from megatron_rpp.runtime.run import Run
from megatron_rpp.stages import critic
from tests.algorithms import oracle
from tests.docs.pages import documented
from tests.hf.models import make, save
from tests.small_run import arguments, config_of, make_data
from tests.whole_runs import VARIED, layout, rows

GAMMA, LAMBDA, KL = 0.9, 0.8, 0.05
SETTINGS = VARIED | {
    "train__minibatches": 1, "train__epochs": 1, "algorithm__name": "ppo",
    "algorithm__gamma": GAMMA, "algorithm__gae_lambda": LAMBDA, "algorithm__kl_coef": KL,
    "critic__value_coef": 0.5, "critic__optimizer__lr": 1e-3,
}  # fmt: skip

SHAPE = {
    "model__vocab_size": 101, "model__ffn_hidden": 48, "model__qk_norm": "true",
    "model__head_dim": 12, "model__rope_theta": 500.0, "model__norm_eps": 1e-6,
}  # fmt: skip
"""The shape of tests/hf/models.py's small Qwen3."""
QWEN = {"pad_token_id": None, "eos_token_id": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    with layout(config_of(folder, folder)):
        yield folder


def built(data: Path, **settings) -> Run:
    config = config_of(data, data / "run", **(SETTINGS | settings))
    return runs.build(config, load_inputs(config), Console(False))


def weights(trained) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trained.model.parameters()]


def one_step(run: Run):
    row, buffer = train.rl_step(run)
    run.advance(run.config.rollout.prompts_per_step)
    return row, buffer


@pytest.fixture(scope="module")
def step(data):
    """The second step of a run: row and buffer. In the first the KL is 0."""
    run = built(data)
    one_step(run)
    return one_step(run)


def padded(buffer, column):
    return buffer.padded(column.double()).numpy()


def test_advantages_and_returns_are_those_of_the_oracle(step):
    _, buffer = step
    mask = buffer.padded(buffer.mask).numpy()
    kl = padded(buffer, buffer.old_logprobs - buffer.ref_logprobs)
    rewards = oracle.token_rewards(buffer.scores.double().numpy(), kl, mask, KL)
    raw, returns = oracle.gae(rewards, padded(buffer, buffer.values), mask, GAMMA, LAMBDA)
    np.testing.assert_allclose(padded(buffer, buffer.returns), returns, atol=1e-6)
    np.testing.assert_allclose(
        padded(buffer, buffer.advantages), oracle.whiten(raw, mask), atol=1e-5
    )
    assert np.abs(kl[mask]).max() > 1e-3


def test_metrics_are_those_of_the_oracle(step):
    row, buffer = step
    values, returns = buffer.values.double().numpy(), buffer.returns.double().numpy()
    explained = 1 - np.var(returns - values) / np.var(returns)
    assert row["critic/explained_variance"] == pytest.approx(explained, rel=1e-6)
    assert row["critic/value_mean"] == pytest.approx(values.mean(), rel=1e-6)
    assert row["critic/return_mean"] == pytest.approx(returns.mean(), rel=1e-6)
    # One mini-batch: the loss is that of the values before the update, and none is clipped.
    loss = 0.5 * oracle.value_loss(values, values, returns, 0.2).mean()
    assert row["critic/loss"] == pytest.approx(loss, rel=1e-5)
    assert row["critic/clip_fraction"] == 0 < row["critic/grad_norm"]


def test_its_tags_are_documented(step):
    row, _ = step
    tags = {tag for tag in row if tag.startswith("critic/")} | {"time/values", "time/critic"}
    assert tags == documented("Critic") | {"time/values", "time/critic"} and tags <= row.keys()


def test_it_starts_from_the_layers_of_the_policy_and_learns(data):
    run = built(data, critic__optimizer__lr=3e-3)
    policy = dict(chunks(run.policy.model)[0].named_parameters())
    start = dict(chunks(run.critic.model)[0].named_parameters())
    shared = start.keys() & policy.keys()
    assert start.keys() - policy.keys() == {"score.weight"}
    assert policy.keys() - start.keys() == {"output_layer.weight"}
    assert all(torch.equal(start[name], policy[name]) for name in shared)
    assert 0 < start["score.weight"].std() < 2 / run.config.model.hidden
    losses = [one_step(run)[0]["critic/loss"] for _ in range(6)]
    assert losses[-1] < 0.8 * losses[0]


def test_it_learns_alone_during_its_warm_up(data):
    run = built(data, critic__warmup_steps=2, train__steps=3)
    policy, values = weights(run.policy), weights(run.critic)
    for _ in range(2):
        row, _ = one_step(run)
        assert row["policy/grad_norm"] == row["policy/skipped_updates"] == 0
        assert row["critic/grad_norm"] > 0 and "time/update" not in row
    assert all(map(torch.equal, policy, weights(run.policy)))
    assert run.policy.scheduler.num_steps == 0
    assert not any(map(torch.equal, values, weights(run.critic)))
    row, _ = one_step(run)
    assert row["policy/grad_norm"] > 0
    assert not any(map(torch.equal, policy, weights(run.policy)))


def test_an_update_that_is_not_finite_is_skipped(data, monkeypatch):
    run = built(data, train__max_skipped_updates=2)
    monkeypatch.setattr(critic, "value_loss", lambda values, *rest: values * torch.nan)
    said: list[str] = []
    run.console.log = said.append
    before = weights(run.critic)
    row, _ = one_step(run)
    assert row["critic/skipped_updates"] == 1 and row["policy/skipped_updates"] == 0
    assert all(map(torch.equal, before, weights(run.critic)))
    assert said == [
        "step 1: update of the critic skipped, mini-batch 0 of epoch 0: the loss on rank 0 is NaN "
        "or infinite"
    ]
    with pytest.raises(RunFailure, match="2 updates in a row were skipped"):
        one_step(run)


def test_values_that_are_not_finite_end_the_run(data):
    run = built(data)
    chunks(run.critic.model)[0].score.weight.data.fill_(torch.inf)
    with pytest.raises(RunFailure, match="the critic's values on rank 0 have"):
        one_step(run)


def test_it_takes_over_the_head_of_the_weights_it_is_given(data):
    run = built(data)
    one_step(run)
    settings = replace(run.config.checkpoint, dir=str(data / "scalar"))
    checkpoint.save(run.critic, run.state, settings).publish()
    other = built(data, critic__init_path=data / "scalar", seed=5)
    assert all(map(torch.equal, weights(run.critic), weights(other.critic)))


def test_a_classifier_gives_it_layers_and_head(data, tmp_path):
    directory = save(tmp_path, "qwen3-score", **QWEN)
    run = built(data, **SHAPE, critic__hf_path=directory)
    head = chunks(run.critic.model)[0].score.weight
    assert torch.equal(head, make("qwen3-score", **QWEN).score.weight)


@pytest.mark.parametrize(
    "shape",
    [{"hidden_size": 16}, {"num_hidden_layers": 2}, {"max_position_embeddings": 16}],
    ids=str,
)
def test_another_shape_is_refused_at_the_start(data, tmp_path, shape):
    directory = save(tmp_path, "qwen3-score", **(QWEN | shape))
    argv = arguments(data, tmp_path, **(SETTINGS | SHAPE), critic__hf_path=directory)
    with pytest.raises(ConfigError, match=r"critic.hf_path .* does not fit the policy: .* here"):
        startup.for_training(argv)


def test_a_directory_that_is_missing_is_refused_at_the_start(data, tmp_path):
    argv = arguments(data, tmp_path, **SETTINGS, critic__init_path=tmp_path / "nothing")
    with pytest.raises(ConfigError, match="critic.init_path: no checkpoint at"):
        startup.for_training(argv)


def test_a_warm_up_does_not_adapt_the_kl_coefficient(data, tmp_path):
    """The policy stands still, so its KL says nothing about the coefficient."""
    settings = SETTINGS | {
        "train__steps": 3, "critic__warmup_steps": 2, "algorithm__kl_controller": "adaptive",
        "algorithm__kl_target": 5.0, "algorithm__kl_horizon": 100, "evaluation__prompts": 4,
    }  # fmt: skip
    config = config_of(data, tmp_path, **settings)
    train.train(config, load_inputs(config))
    coefficients = [row["kl/coef"] for row in rows(tmp_path / "logs/metrics.jsonl")]
    assert coefficients == [KL, KL, KL]  # the first two steps left it as it was


def test_a_run_of_ppo_gives_its_critic(data, tmp_path):
    run = built(data, critic__optimizer__lr=3e-2)
    one_step(run)
    settings = replace(run.config.checkpoint, dir=str(tmp_path / "ppo"))
    checkpoint.save(run.policy, run.state, settings, critic=run.critic).publish()
    other = built(data, critic__init_path=tmp_path / "ppo", seed=5)
    assert all(map(torch.equal, weights(run.critic), weights(other.critic)))
    assert not all(map(torch.equal, weights(run.critic), weights(built(data).critic)))


def test_weights_that_are_replaced_are_not_drawn(data, monkeypatch):
    """Drawing those of a large model takes minutes."""
    run = built(data)
    one_step(run)
    settings = replace(run.config.checkpoint, dir=str(data / "start"))
    checkpoint.save(run.policy, run.state, settings).publish()

    def fill(*_):
        raise AssertionError("random weights were drawn")

    monkeypatch.setattr(initialization, "fill", fill)
    other = built(data, model__init_path=data / "start")
    assert chunks(other.critic.model)[0].score.weight.abs().max() > 0
