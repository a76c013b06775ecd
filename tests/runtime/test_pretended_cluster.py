"""Ranks of a cluster of 64 GPUs, pretended: the counts of the estimate are those of Megatron.

The 70B model is built at full size on the meta device, over torch's fake process group: no memory,
no other processes. Parameters, gradient buffers, Adam's shards and the shards of a checkpoint are
Megatron's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend "fake")

from megatron_rpp.checkpoint.optimizer_shards import optimizer_shards
from megatron_rpp.checkpoint.optimizer_state import allocate_moments
from megatron_rpp.checkpoint.weights import model_state
from megatron_rpp.config import Config, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rpp.model.build import build_model, wrap_for_training
from megatron_rpp.model.optimizer import build_optimizer
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.runtime.memory_estimate import checkpoint_bytes, stage_estimate

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

WORLD, VOCAB = 64, 128256
LLAMA_70B = ModelConfig(
    layers=80, hidden=8192, ffn_hidden=28672, heads=64, kv_heads=8, max_length=4096, dtype="bf16"
)
QWEN_7B = ModelConfig(
    layers=28, hidden=3584, ffn_hidden=18944, heads=28, kv_heads=4, max_length=4096, dtype="bf16",
    qkv_bias=True,
)  # fmt: skip
PP4 = ParallelConfig(tensor=8, pipeline=4, sequence_parallel=True)
# (model, layout, rank): first and last stages, stages between, and several data-parallel ranks.
RANKS = [
    *((LLAMA_70B, PP4, rank) for rank in (0, 8, 31, 63)),
    (LLAMA_70B, replace(PP4, virtual_pipeline=5), 0),
    (LLAMA_70B, ParallelConfig(tensor=8, pipeline=2, context=2, sequence_parallel=True), 40),
    (QWEN_7B, ParallelConfig(tensor=4, sequence_parallel=True), 63),
]


@contextmanager
def pretended(rank: int, parallel: ParallelConfig, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as rank `rank` of WORLD, whose tensors have shapes but no memory."""
    meta = torch.device("meta")
    kind = torch.Tensor.type
    patch.setattr(devices, "device", lambda: meta)
    patch.setattr(torch.cuda, "current_device", lambda: meta)

    def as_cuda(tensor, *to):  # Megatron's optimizer takes parameters of CUDA types only
        return kind(tensor, *to) if to else kind(tensor).replace(".meta", ".cuda")

    patch.setattr(torch.Tensor, "type", as_cuda)
    # Its members are gathered from the other ranks, which are not there.
    patch.setattr(groups, "_start_replica_group", lambda context: None)
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=WORLD)
    try:
        groups.start(**parallel.sizes(), seed=1)
        with meta:
            yield
    finally:
        groups.stop()


@pytest.mark.parametrize("model, parallel, rank", RANKS)
def test_counts_of_a_rank(model, parallel, rank, monkeypatch):
    with pretended(rank, parallel, monkeypatch):
        stage = groups.pipeline_group().rank()
        wrapped = wrap_for_training(
            build_model(model, parallel, vocab_size=VOCAB, seed=None), distributed_optimizer=True
        )
        optimizer, _ = build_optimizer(wrapped, OptimizerConfig(), bf16=True)
        allocate_moments(optimizer)
        (part,) = optimizer.chained_optimizers
        held = sum(p.numel() for group in part.optimizer.param_groups for p in group["params"])
        moments = sum(
            t.numel() for s in part.optimizer.state.values() for t in s.values() if t.dim()
        )
        weights = model_state(wrapped)
        adam = optimizer_shards(part, weights)
        apply_factories(weights)
        replicas, sharing = groups.data_size(), groups.token_group().size()

        config = Config(model=model, parallel=parallel)
        memory = stage_estimate(config, VOCAB, replicas=replicas, stage=stage)
        expected = memory.weights // 2
        assert sum(p.numel() for p in wrapped.parameters()) == expected
        gradients = sum(buffer.numel for chunk in wrapped for buffer in chunk.buffers)
        # Megatron pads each parameter to 64 elements and a buffer to a multiple of its ranks.
        assert 4 * gradients == pytest.approx(memory.gradients, rel=1e-4)
        assert gradients >= expected
        assert 12 * held == pytest.approx(memory.optimizer, rel=1e-3)
        assert held * sharing >= expected
        assert moments == 2 * held
        saved = sum(shard.data.numel() for shards in adam.values() for shard in shards)
        assert saved == 3 * held
        tensors = [entry for entry in nested_values(weights) if isinstance(entry, ShardedTensor)]
        assert sum(entry.data.numel() for entry in tensors) == expected


def test_the_checkpoint_of_all_ranks():
    """14 bytes for each of the 70B parameters: bf16 weights, fp32 weights and two moments."""
    assert checkpoint_bytes(Config(model=LLAMA_70B), VOCAB) == 14 * 70_553_706_496
