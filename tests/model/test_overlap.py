"""Weights that are gathered during the forward pass are those of a gather after each update, bit for
bit: real ranks take optimizer steps both ways, with buckets that are smaller than a layer.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config import (
    CheckpointConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    cli,
)
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.model import build, overlap, pipeline
from megatron_rpp.model.optimizer import build_optimizer
from megatron_rpp.model.overlap import Overlap
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.stages.logprobs import make_micro_batches, token_logprobs
from megatron_rpp.stages.minibatches import optimizer_step
from tests.distributed import run_ranks
from tests.rollout.test_buffer import make_buffer
from tests.whole_runs import small_buckets

MODEL = ModelConfig(layers=4, hidden=32, ffn_hidden=64, heads=4, max_length=32, init_std=0.2)
STEPS = 3
LAYOUTS = {
    2: [{}, {"context": 2}],
    4: [{"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}],
}


class Trained(NamedTuple):
    weights: list[torch.Tensor]
    losses: list[torch.Tensor]
    """Of each step: what its forward pass read."""
    buckets: int
    unfinished: int
    """Weights that were not whole after the last optimizer step."""


def trained(
    model: ModelConfig, parallel: ParallelConfig
) -> tuple[TrainedModel, list[torch.Tensor]]:
    """Takes STEPS optimizer steps on the mean log-prob of 16 responses. Returns the losses, too."""
    stage = build.build_model(model, parallel, vocab_size=100, seed=3)
    wrapped = build.wrap_for_training(stage, True, parallel)
    settings = OptimizerConfig(lr=0.01)
    policy = TrainedModel(wrapped, *build_optimizer(wrapped, settings, bf16=model.dtype == "bf16"))
    samples = [([1 + i, 2], [3 + (i + j) % 90 for j in range(6)]) for i in range(16)]
    buffer = make_buffer(samples[groups.data_rank() :: groups.data_size()])

    def loss(batch, hidden):
        logprobs, _ = token_logprobs(wrapped, batch, hidden, temperature=1.0)
        total, count = -logprobs.sum(), torch.tensor(len(logprobs), dtype=torch.int)
        return total, count, total.detach()

    batches = make_micro_batches(wrapped, buffer, list(range(len(buffer))), max_tokens=32)
    assert len(batches) > 1
    losses = []
    for _ in range(STEPS):
        losses += optimizer_step(policy, batches, loss).reports
    if parallel.overlap_param_gather:
        with pytest.raises(AssertionError):
            pipeline.forward(wrapped, batches, lambda batch, hidden: hidden)
    return policy, losses


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def train(model: ModelConfig, parallel: ParallelConfig) -> Trained:
    policy, losses = trained(model, parallel)
    before = weights_of(policy.model)
    assert overlap.are_weights_complete(policy.model) != parallel.overlap_param_gather
    overlap.complete_weights(policy.model)
    assert overlap.are_weights_complete(policy.model)
    after = weights_of(policy.model)
    unfinished = sum(not torch.equal(one, other) for one, other in zip(before, after))
    return Trained(after, losses, len(policy.model[0].bucket_groups), unfinished)


def both_ways(rank: int, layouts: list[dict]) -> None:
    """Trains each layout with and without overlapped gathers, and compares."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    models = [MODEL, replace(MODEL, tied_embeddings=True, dtype="bf16")]
    for sizes in layouts:
        parallel = ParallelConfig(**sizes, overlap_grad_reduce=True, overlap_param_gather=False)
        groups.start(**parallel.sizes(), seed=1)
        for model in models:
            with small_buckets():
                after = train(model, parallel)
                during = train(model, replace(parallel, overlap_param_gather=True))
            assert after.unfinished == 0 and during.unfinished > 0, (sizes, during.unfinished)
            # Megatron makes one bucket of a later pipeline stage.
            assert during.buckets > 1 or groups.pipeline_group().rank() > 0
            for one, other in zip(after.weights, during.weights, strict=True):
                assert torch.equal(one, other), (sizes, model.dtype, one.shape)
            assert all(map(torch.equal, after.losses, during.losses))
        groups.destroy()


def save_and_load(rank: int, folder: Path) -> None:
    """Saves before the weights are gathered, and compares with them what a new model loads."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    parallel = ParallelConfig(overlap_param_gather=True)
    groups.start(**parallel.sizes(), seed=1)
    with small_buckets():
        policy, _ = trained(MODEL, parallel)
    path = checkpoint.save(policy, RunState(step=1), CheckpointConfig(dir=str(folder))).publish()
    stage = build.build_model(MODEL, parallel, vocab_size=100, seed=4)
    checkpoint.load_weights(stage, path)
    overlap.complete_weights(policy.model)
    assert all(map(torch.equal, weights_of(stage), weights_of(policy.model)))


@pytest.mark.slow
def test_a_save_has_the_whole_weights(tmp_path):
    run_ranks(save_and_load, 2, tmp_path, tmp_path / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_weights_gathered_during_the_forward_pass_have_the_same_bits(ranks, tmp_path):
    run_ranks(both_ways, ranks, tmp_path, LAYOUTS[ranks])


@pytest.mark.parametrize(
    "grad_reduce, param_gather, on_cpu, on_gpu",
    [
        (None, None, (False, False), (True, True)),
        (True, None, (True, False), (True, True)),
        (False, None, (False, False), (False, False)),
        (None, True, (True, True), (True, True)),
        (None, False, (False, False), (True, False)),
        (True, True, (True, True), (True, True)),
    ],
)
def test_what_overlaps_by_default(grad_reduce, param_gather, on_cpu, on_gpu, monkeypatch):
    parallel = ParallelConfig(overlap_grad_reduce=grad_reduce, overlap_param_gather=param_gather)
    for cpu, expected in ((True, on_cpu), (False, on_gpu)):
        monkeypatch.setattr(devices, "ON_CPU", cpu)
        assert Overlap.of(parallel, True) == Overlap(*expected)
        assert Overlap.of(parallel, False) == Overlap(expected[0], False)


def test_a_gather_that_cannot_overlap_is_refused():
    with pytest.raises(ConfigError, match="needs parallel.overlap_grad_reduce, got false"):
        ParallelConfig(overlap_grad_reduce=False, overlap_param_gather=True)
    parallel, whole = ParallelConfig(overlap_param_gather=True), OptimizerConfig(distributed=False)
    with pytest.raises(ConfigError, match="needs optimizer.distributed, got false"):
        Config(parallel=parallel, optimizer=whole)


def test_the_flag_of_megatron_is_accepted():
    config = cli.parse(["--overlap-grad-reduce", "--overlap-param-gather"]).config
    assert config.parallel.overlap_grad_reduce and config.parallel.overlap_param_gather
