"""A rank's stretch of the flattened parameters as rectangles of whole tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.checkpoint.optimizer_shards import optimizer_shards, rectangles
from megatron_rpp.checkpoint.optimizer_state import allocate_moments
from megatron_rpp.checkpoint.weights import model_state
from megatron_rpp.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rpp.model import build
from megatron_rpp.model.optimizer import build_optimizer
from megatron_rpp.parallel import groups
from tests.distributed import run_ranks


@st.composite
def stretches(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    size = math.prod(shape)
    start = draw(st.integers(0, size))
    return shape, start, draw(st.integers(start, size))


@given(stretches())
def test_the_rectangles_hold_each_element_once_and_in_order(stretch):
    shape, start, stop = stretch
    array, found = np.arange(math.prod(shape)).reshape(shape), []
    for offsets, sizes in rectangles(start, stop, shape):
        assert len(offsets) == len(sizes) == len(shape) and min(sizes) > 0
        part = array[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]
        found.extend(part.ravel().tolist())
    assert found == list(range(start, stop))


@pytest.mark.parametrize(
    "stretch, expected",
    [
        ((0, 12), [([0, 0], [3, 4])]),  # the whole matrix of 3 rows of 4
        ((5, 7), [([1, 1], [1, 2])]),  # inside a row
        ((2, 11), [([0, 2], [1, 2]), ([1, 0], [1, 4]), ([2, 0], [1, 3])]),
        ((3, 3), []),
    ],
)
def test_rectangles_of_a_matrix(stretch, expected):
    assert list(rectangles(*stretch, [3, 4])) == expected


MODEL = ModelConfig(layers=4, hidden=32, ffn_hidden=48, heads=4, kv_heads=2, max_length=32)
LAYOUTS = [{}, {"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}]


def covered(rank: int) -> list[dict[str, torch.Tensor]]:
    """For each layout: how often this rank's main shards hold each element, by key."""
    found = []
    for sizes in LAYOUTS:
        parallel = ParallelConfig(**sizes)
        groups.start(**parallel.sizes(), seed=1)
        stage = build.build_model(MODEL, parallel, vocab_size=50, seed=3)
        model = build.wrap_for_training(stage, True)
        optimizer, _ = build_optimizer(model, OptimizerConfig(), bf16=False)
        allocate_moments(optimizer)
        (part,) = optimizer.chained_optimizers
        counts: dict[str, torch.Tensor] = {}
        held = 0
        for key, shards in optimizer_shards(part, model_state(model)).items():
            counts[key] = torch.zeros(shards[0].global_shape, dtype=torch.int32)
            for shard in shards:
                held += shard.data.numel()
                if shard.replica_id == (0, 0, 0):
                    counts[key][shard.global_slice()] += 1
        # The shards are views of the rank's own state and hold nothing else.
        owned = sum(p.numel() for group in part.optimizer.param_groups for p in group["params"])
        assert held == 3 * owned
        found.append(counts)
        groups.destroy()
    return found


def test_the_ranks_together_hold_each_element_once(tmp_path):
    per_rank = run_ranks(covered, 4, tmp_path)
    for layout in range(len(LAYOUTS)):
        keys = {key for member in per_rank for key in member[layout]}
        assert {key.split(".")[2] for key in keys} == {"param", "exp_avg", "exp_avg_sq"}
        for key in keys:
            total = sum(member[layout].get(key, torch.zeros(())) for member in per_rank)
            if "word_embeddings" in key or "output_layer" in key:
                total = total[:50]  # the padding rows depend on the layout
            assert (total == 1).all(), (LAYOUTS[layout], key)
