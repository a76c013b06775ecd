"""Plans: what must hold of every model and machine."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
    VllmConfig,
)
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.runtime.assumptions import Assumptions
from megatron_rpp.runtime.machines import MACHINES
from megatron_rpp.runtime.memory_estimate import estimate
from megatron_rpp.runtime.plan import USABLE, best_plans, candidates, limits, plans
from megatron_rpp.runtime.step_time import step_time
from tests.hf.models import save

H100, ASSUMED, VOCAB = MACHINES["h100"], Assumptions(), 128000


@st.composite
def runs(draw) -> Config:
    """Models of 0.3B to 70B, by usual proportions, and their rollouts."""
    heads = draw(st.sampled_from([8, 16, 32, 64]))
    return Config(
        model=ModelConfig(
            layers=draw(st.sampled_from([16, 24, 32, 80])), hidden=128 * heads,
            ffn_hidden=448 * heads, heads=heads, kv_heads=8, max_length=4096, dtype="bf16",
            tied_embeddings=draw(st.booleans()),
        ),
        rollout=RolloutConfig(
            prompts_per_step=1024, samples_per_prompt=draw(st.sampled_from([1, 8])),
            max_new_tokens=draw(st.sampled_from([512, 3072])), max_batch=64,
        ),
        train=TrainConfig(minibatches=4, max_tokens_per_microbatch=4096),
    )  # fmt: skip


def test_rollouts_on_vllm_are_not_planned():
    vllm = RolloutConfig(engine="vllm", vllm=VllmConfig(python="python"))
    with pytest.raises(ConfigError, match="add --rollout.engine megatron"):
        best_plans(Config(rollout=vllm), VOCAB, gpus=8, machine=H100, assumed=ASSUMED)


def total(config: Config, replicas: int = 1, **parallel: int) -> int:
    parallel["sequence_parallel"] = parallel.get("tensor", 1) > 1
    layout = replace(config, parallel=ParallelConfig(**parallel))
    return estimate(layout, VOCAB, replicas).total


@settings(max_examples=25)
@given(runs())
def test_memory_falls_with_every_kind_of_ranks_and_of_recomputation(config):
    for name in ("tensor", "context"):
        held = [total(config, **{name: size}) for size in (1, 2, 4, 8)]
        assert all(more > less for more, less in pairwise(held))
    stages = [total(config, pipeline=size) for size in (1, 2, 4)]
    # Of the micro-batches of fewer layers more are in flight, so activations stay the same.
    assert all(more > less for more, less in pairwise(stages))
    replicas = [total(config, replicas=count) for count in (1, 4, 16)]
    assert all(more > less for more, less in pairwise(replicas))
    recomputed = [
        estimate(replace(config, train=replace(config.train, recompute=kind)), VOCAB, 1).total
        for kind in ("none", "selective", "full")
    ]
    assert recomputed == sorted(recomputed, reverse=True)


@settings(max_examples=25)
@given(runs(), st.sampled_from(["layers", "hidden", "ffn_hidden"]))
def test_a_larger_model_needs_more_memory_and_time(config, name):
    larger = replace(config, model=replace(config.model, **{name: 2 * getattr(config.model, name)}))
    assert total(larger) > total(config)
    times = [
        step_time(run, VOCAB, replicas=1, machine=H100, assumed=ASSUMED) for run in (config, larger)
    ]
    assert times[1].update > times[0].update and times[1].rollout >= times[0].rollout


@settings(max_examples=5)
@given(runs(), st.sampled_from(sorted(MACHINES)))
def test_more_gpus_are_never_slower(config, kind):
    """The best layouts of 8, 16 and 64 GPUs at the same global work; all of them fit."""
    machine = MACHINES[kind]
    last = float("inf")
    for gpus in (8, 16, 64):
        try:
            found = best_plans(config, VOCAB, gpus=gpus, machine=machine, assumed=ASSUMED)
        except ConfigError:
            assert last == float("inf"), "more GPUs must not hold less"
            continue
        times = [plan.time.total for plan in found]
        assert times == sorted(times) and times[0] <= last
        last = times[0]
        bound = limits(config, VOCAB, machine=machine, assumed=ASSUMED)
        for plan in found:
            sizes = plan.config.parallel
            ranks = sizes.tensor * sizes.pipeline * sizes.context * plan.replicas
            assert ranks == plan.gpus <= gpus and plan.memory.total <= USABLE * machine.memory
            assert plan.time.rollout >= bound.rollout_seconds
            assert plan.gpus >= bound.state_gpus


def test_better_efficiency_links_and_machines_are_faster():
    config = replace(
        Config(),
        model=ModelConfig(
            layers=32, hidden=4096, ffn_hidden=14336, heads=32, kv_heads=8, max_length=4096,
            dtype="bf16",
        ),
        rollout=RolloutConfig(prompts_per_step=128, max_new_tokens=3072),
        parallel=ParallelConfig(tensor=4, pipeline=2, context=2, sequence_parallel=True),
    )  # fmt: skip

    def seconds(machine: str = "h100", **changed: float) -> float:
        assumed = replace(ASSUMED, **changed)
        return step_time(
            config, VOCAB, replicas=2, machine=MACHINES[machine], assumed=assumed
        ).total

    assert seconds("b200") < seconds("h200") < seconds("h100", host_ms_per_layer=1.0)
    better = {
        "efficiency": 0.8, "half_width": 0.0, "memory_efficiency": 0.9, "link_efficiency": 1.0,
        "hidden_share": 0.5, "row_fill": 1.0, "host_ms_per_layer": 0.05,
    }  # fmt: skip
    for name, value in better.items():
        assert seconds(**{name: value}) < seconds(), name


def test_too_few_gpus_are_refused():
    llama = ModelConfig(
        layers=80, hidden=8192, ffn_hidden=28672, heads=64, kv_heads=8, max_length=4096,
        dtype="bf16",
    )  # fmt: skip
    config = Config(model=llama, rollout=RolloutConfig(prompts_per_step=128))
    assert limits(config, VOCAB, machine=H100, assumed=ASSUMED).state_gpus == 16
    with pytest.raises(ConfigError, match="no layout on 8 GPUs fits: the leanest needs .* GB"):
        best_plans(config, VOCAB, gpus=8, machine=H100, assumed=ASSUMED)
    with pytest.raises(ConfigError, match="no layout divides 7 GPUs"):
        plans(config, VOCAB, gpus=7, machine=H100, assumed=ASSUMED)


def test_layouts_that_a_reward_model_cannot_have_are_left_out(tmp_path):
    """Its four heads are one key-value head: only tensor 1 divides it. A directory without a model is
    refused."""
    save(tmp_path, "qwen3-score", num_key_value_heads=1)
    run = Config(reward=RewardConfig(functions=[f"model:{tmp_path / 'qwen3-score'}"]))
    tensors = {layout.parallel.tensor for layout, _ in candidates(run, gpus=4, machine=H100)}
    assert tensors == {1}
    with pytest.raises(ConfigError, match="no checkpoint at"):
        list(candidates(Config(reward=RewardConfig(functions=["model:/nothing"])), 4, H100))
