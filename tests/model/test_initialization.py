"""Random weights depend on the seed alone: every layout starts from the same whole model.

Four real ranks build the model on each layout and return their shards. The test puts the shards
together by its own table of how Megatron cuts a matrix, and compares bit for bit.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from megatron_rpp.config import ModelConfig, ParallelConfig
from megatron_rpp.config.model import padded_vocab_size
from megatron_rpp.model import build
from megatron_rpp.parallel import groups
from tests.distributed import run_ranks

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, VOCAB, STD = 4, 32, 48, 4, 2, 100, 0.02
HEAD = HIDDEN // HEADS
LAYOUTS = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(tensor=2),
    "PP2": ParallelConfig(pipeline=2),
    "TP2 x PP2": ParallelConfig(tensor=2, pipeline=2),
    "PP2 of 2 chunks each": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "CP2": ParallelConfig(context=2),
}
SHAPES = {
    "embedding.word_embeddings.weight": (128, HIDDEN),  # 100 rows, padded to a multiple of 64
    "linear_qkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
    "linear_proj.weight": (HIDDEN, HIDDEN),
    "linear_fc1.weight": (2 * FFN, HIDDEN),  # gate, then up
    "linear_fc2.weight": (HIDDEN, FFN),
    "output_layer.weight": (128, HIDDEN),
}


def model_config(tied):
    return ModelConfig(
        layers=LAYERS,
        hidden=HIDDEN,
        ffn_hidden=FFN,
        heads=HEADS,
        kv_heads=KV_HEADS,
        tied_embeddings=tied,
        init_std=STD,
    )


def build_on_every_layout(rank):
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    built = {}
    for layout, parallel in LAYOUTS.items():
        groups.start(**parallel.sizes(), seed=1)
        for tied in (False, True):
            for seed in (7, 8) if layout == "TP1" else (7,):
                stage = build.build_model(model_config(tied), parallel, vocab_size=VOCAB, seed=seed)
                built[layout, tied, seed] = {
                    "place": (groups.tensor_group().rank(), groups.pipeline_group().rank()),
                    "count": build.parameter_count(stage),
                    "weights": [
                        {k: v.detach().clone() for k, v in chunk.named_parameters()}
                        for chunk in stage
                    ],
                }
        groups.destroy()
    return built


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(build_on_every_layout, 4, tmp_path_factory.mktemp("ranks"))


def join(name, parts):
    """Joins the whole parameter from its tensor-parallel shards, given in rank order."""
    if name.endswith("linear_fc1.weight"):
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    if parts[0].dim() == 1:
        assert all(torch.equal(part, parts[0]) for part in parts), name
        return parts[0]
    row_parallel = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return torch.cat(parts, 1 if row_parallel else 0)


def whole_name(name, part, parts):
    words = name.split(".")
    if words[:2] == ["decoder", "layers"]:
        words[2] = str(int(words[2]) + part * LAYERS // parts)
    return ".".join(words)


def whole_model(ranks, layout, tied, seed=7):
    """{name: weight} of the first replica; a copy of tied weights stays as "output_layer"."""
    sizes = LAYOUTS[layout]
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for rank in ranks:
        part, stage = rank[layout, tied, seed]["place"]
        for chunk, weights in enumerate(rank[layout, tied, seed]["weights"]):
            for name, weight in weights.items():
                place = chunk * sizes.pipeline + stage  # chunks are dealt to the stages in turn
                name = whole_name(name, place, sizes.pipeline * sizes.virtual_pipeline)
                parts.setdefault(name, {}).setdefault(part, weight)
    return {name: join(name, [of[i] for i in range(sizes.tensor)]) for name, of in parts.items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_the_same_whole_weights_on_every_layout(ranks, layout, tied):
    expected = whole_model(ranks, "TP1", tied)
    found = whole_model(ranks, layout, tied)
    if tied and LAYOUTS[layout].pipeline > 1:  # the last stage holds a copy of its own
        copy = found.pop("output_layer.weight")
        assert torch.equal(copy, expected["embedding.word_embeddings.weight"])
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_shapes_and_names(ranks):
    for tied in (False, True):
        weights = whole_model(ranks, "TP1", tied)
        matrices = {name: w for name, w in weights.items() if w.dim() == 2}
        assert len(matrices) == 4 * LAYERS + (1 if tied else 2)
        for name, weight in matrices.items():
            ending = name if name in SHAPES else ".".join(name.split(".")[-2:])
            assert tuple(weight.shape) == SHAPES[ending], name


def test_replicas_are_equal(ranks):
    (first,) = ranks[0]["TP1", False, 7]["weights"]
    for rank in ranks[1:]:
        (other,) = rank["TP1", False, 7]["weights"]
        assert all(torch.equal(other[name], weight) for name, weight in first.items())


def test_another_seed_gives_other_weights(ranks):
    ours, other = whole_model(ranks, "TP1", False), whole_model(ranks, "TP1", False, seed=8)
    for name, weight in ours.items():
        if weight.dim() == 2:
            assert not torch.isclose(weight, other[name]).all(1).any(), name


def test_no_two_matrices_share_their_noise(ranks):
    weights = [w for w in whole_model(ranks, "TP1", False).values() if w.dim() == 2]
    starts = {tuple((w.flatten()[:4] / w.std()).tolist()) for w in weights}
    assert len(starts) == len(weights) == 4 * LAYERS + 2


def test_standard_deviations_are_those_of_the_configuration(ranks):
    """Within five standard errors: 1/sqrt(2n) of a standard deviation, 1/sqrt(n) of a mean."""
    for name, weight in whole_model(ranks, "TP1", False).items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones(HIDDEN)), name
            continue
        residual = "linear_proj" in name or "linear_fc2" in name
        std = STD / math.sqrt(2 * LAYERS) if residual else STD
        count = weight.numel()
        assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * count), name
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(count), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_count_once(ranks, layout, tied):
    matrices = sum(rows * columns for rows, columns in list(SHAPES.values())[1:-1])
    expected = LAYERS * (matrices + 2 * HIDDEN) + HIDDEN + 128 * HIDDEN * (1 if tied else 2)
    assert {rank[layout, tied, 7]["count"] for rank in ranks} == {expected}


@pytest.mark.parametrize(
    ("vocab", "tensor", "rows"), [(64, 1, 64), (65, 1, 128), (100, 2, 128), (100, 3, 192)]
)
def test_vocabulary_padding(vocab, tensor, rows):
    assert padded_vocab_size(vocab, tensor) == rows
