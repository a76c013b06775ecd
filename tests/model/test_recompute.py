"""Recomputed activations and overlapped reductions give the gradients of the plain backward pass.

Every layout of the layout gate (tests/runs/test_layouts.py) computes one gradient in several ways.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from megatron_rpp.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_rpp.model import build, pipeline
from megatron_rpp.parallel import groups
from megatron_rpp.stages.logprobs import make_micro_batches, token_logprobs
from tests.distributed import run_ranks
from tests.rollout.test_buffer import make_buffer

MODEL = ModelConfig(layers=4, hidden=32, ffn_hidden=64, heads=4, max_length=32, init_std=0.2)
RECOMPUTE = {
    "selective": TrainConfig(recompute="selective"),
    "full": TrainConfig(recompute="full"),
    "full, first layer": TrainConfig(recompute="full", recompute_method="block"),
}
LAYOUTS = {
    1: [{}],
    2: [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"context": 2},
        {},
    ],
    4: [
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"context": 2},
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"tensor": 2, "context": 2, "sequence_parallel": True},
        {"pipeline": 2, "context": 2, "virtual_pipeline": 2},
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence_parallel": True},
        {},
    ],
}


def gradients(parallel: ParallelConfig, train: TrainConfig, overlap: bool) -> torch.Tensor:
    """This rank's part of the gradient of the mean log-prob of 16 responses."""
    stage = build.build_model(MODEL, parallel, vocab_size=50, seed=3, train=train)
    model = build.wrap_for_training(stage, True, replace(parallel, overlap_grad_reduce=overlap))
    samples = [([1 + i, 2], [3 + (i + j) % 40 for j in range(6)]) for i in range(16)]
    buffer = make_buffer(samples[groups.data_rank() :: groups.data_size()])

    def loss(batch, hidden):
        logprobs, _ = token_logprobs(model, batch, hidden, temperature=1.0)
        total, count = -logprobs.sum(), torch.tensor(len(logprobs), dtype=torch.int)
        return total, count, total.detach()

    for chunk in model:
        chunk.zero_grad_buffer()
    batches = make_micro_batches(model, buffer, list(range(len(buffer))), max_tokens=16)
    assert len(batches) > 1
    pipeline.train(model, batches, loss)
    rank, size = groups.token_group().rank(), groups.token_group().size()
    buckets = (bucket for chunk in model for buffer in chunk.buffers for bucket in buffer.buckets)
    # With the distributed optimizer, a rank holds the sums of its own part of each bucket.
    return torch.cat([bucket.grad_data.chunk(size)[rank] for bucket in buckets])


def deviations(rank: int, layouts: list[dict]) -> list[dict[str, float]]:
    """The largest deviation of each way from the plain gradient, relative to its largest value."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    found = []
    for sizes in layouts:
        parallel = ParallelConfig(**sizes)
        groups.start(**parallel.sizes(), seed=1)
        plain = gradients(parallel, TrainConfig(), False)
        assert plain.abs().max() > 0
        ways = {name: gradients(parallel, train, False) for name, train in RECOMPUTE.items()}
        ways["overlap"] = gradients(parallel, TrainConfig(), True)
        ways["overlap and full"] = gradients(parallel, RECOMPUTE["full"], True)
        scale = plain.abs().max()
        found.append({name: float((way - plain).abs().max() / scale) for name, way in ways.items()})
        groups.destroy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_the_gradients_are_those_of_the_plain_backward_pass(ranks, tmp_path):
    """Recomputation repeats the same operations, so not a bit differs. Overlapped reductions add the
    same numbers in other pieces, which rounds differently in fp32."""
    for member in run_ranks(deviations, ranks, tmp_path, LAYOUTS[ranks], timeout=300):
        for sizes, ways in zip(LAYOUTS[ranks], member, strict=True):
            for way, deviation in ways.items():
                assert deviation <= (1e-6 if "overlap" in way else 0), (sizes, way, deviation)
