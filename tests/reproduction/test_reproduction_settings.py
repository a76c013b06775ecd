"""All algorithms do equal work: their resolved settings differ only where the protocol says so."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from reproduction.execute import Runner, command_of
from reproduction.protocol import (
    ALGORITHMS,
    CRITIC_RATE,
    EXPERIMENTS,
    QUICK,
    ROOT,
    Experiment,
    Scale,
    Start,
    run_job,
)

from megatron_rpp.config import cli

RUN = Path("/runs")
START = Start(data=RUN / "data", warm_start=RUN / "sft", reward_model=RUN / "model")


def settings_of(experiment: Experiment, algorithm: str, scale: Scale) -> dict:
    """The resolved settings of a run."""
    job = run_job(experiment, algorithm, rate=1e-4, seed=7, start=START, scale=scale)
    command = command_of(job, RUN / "here")
    words = [word for word in command if word.startswith("--") or word.endswith(".yaml")]
    words = [word for word in words if not word.startswith("--nproc-per-node")]
    return asdict(cli.parse(words).config)


@pytest.mark.parametrize("scale", [Scale(), QUICK], ids=["full", "quick"])
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_algorithms_differ_in_nothing_else(experiment, scale):
    base = settings_of(experiment, "reinforce++", scale)
    common, none = base.pop("algorithm"), base.pop("critic")
    for algorithm in experiment.algorithms:
        found = settings_of(experiment, algorithm, scale)
        own, critic = found.pop("algorithm"), found.pop("critic")
        assert found == base
        in_reward = algorithm in ("reinforce++", "ppo")
        expected = {
            "name": algorithm,
            "kl_coef": 0.01 if in_reward else 0.0,
            "kl_loss_coef": 0.0 if in_reward else 0.01,
            "gae_lambda": 0.95 if algorithm == "ppo" else 1.0,
        }
        assert own == common | expected
        if algorithm == "ppo":
            optimizer = base["optimizer"] | {"lr": pytest.approx(CRITIC_RATE * 1e-4)}
            assert critic == none | {"value_clip": 0.2, "optimizer": optimizer}
        else:
            assert critic == none


def test_accuracy_is_by_the_rule_and_the_reward_is_the_models():
    by_name = {experiment.name: experiment for experiment in EXPERIMENTS}
    rule, model = (
        settings_of(by_name[name], "grpo", Scale())["reward"] for name in ("math", "math-model")
    )
    assert rule["functions"] == ["exact_match"] and rule["weights"] == []
    assert model["functions"] == ["exact_match", "model:/runs/model"]
    assert model["weights"] == [0, 1]


def test_seeds_and_rates_and_algorithms_have_directories_of_their_own():
    runner = Runner(RUN, (0,))
    folders = {
        runner.directory(
            run_job(experiment, algorithm, rate=rate, seed=seed, start=START, scale=Scale())
        )
        for experiment in EXPERIMENTS
        for algorithm in ALGORITHMS
        for rate in (1e-4, 2e-4)
        for seed in (1, 2)
    }
    assert len(folders) == len(EXPERIMENTS) * len(ALGORITHMS) * 4


def test_the_digest_depends_on_settings_but_not_on_the_place(tmp_path):
    def digest(run: Path, rate: float) -> str:
        start = Start(data=run / "data", warm_start=run / "sft", reward_model=None)
        job = run_job(EXPERIMENTS[1], "ppo", rate=rate, seed=1, start=start, scale=Scale())
        return Runner(run, (0,)).digest(job)

    assert digest(Path("/a"), 1e-4) == digest(ROOT / "b", 1e-4)
    assert digest(Path("/a"), 1e-4) != digest(Path("/a"), 2e-4)
