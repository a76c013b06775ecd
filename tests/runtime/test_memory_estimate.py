"""The estimate equals the bytes of a real model for its state. test_memory_peak.py has the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config import ParallelConfig
from megatron_rpp.model import decode_sizes
from megatron_rpp.model.build import build_model
from megatron_rpp.model.decoder import decoders
from megatron_rpp.model.language_model import unwrap
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.rollout.blocks import Blocks
from megatron_rpp.rollout.engine import new_cache
from megatron_rpp.runtime.activation_memory import CPU, rows_in_flight
from megatron_rpp.runtime.cache_size import max_cache_tokens
from megatron_rpp.runtime.host_memory import host_estimate
from megatron_rpp.runtime.memory_estimate import (
    checkpoint_bytes,
    estimate,
    stage_estimate,
    stage_estimates,
)
from megatron_rpp.runtime.model_size import stage_parameters
from megatron_rpp.runtime.policy import build_policy
from tests.distributed import run_ranks
from tests.small_run import config_of
from tests.whole_runs import layout

VOCAB = 100  # padded to 128


def small(tmp_path, **settings):
    return config_of(tmp_path, tmp_path, model__vocab_size=VOCAB, **settings)


def test_a_parameter_count_by_hand(tmp_path):
    """Hidden 32, 4 heads of 8 and 2 key-value heads, 64 feed-forward channels, 4 layers."""
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32
    model = small(tmp_path).model
    assert (
        stage_parameters(model, ParallelConfig(), vocab_size=VOCAB, stage=0)
        == 2 * 128 * 32 + 4 * layer + 32
    )
    tied = replace(model, tied_embeddings=True)
    assert (
        stage_parameters(tied, ParallelConfig(), vocab_size=VOCAB, stage=0)
        == 128 * 32 + 4 * layer + 32
    )


def count(model, parallel, rank):
    groups.start(**parallel.sizes(), seed=1)
    stage = unwrap(build_model(model, parallel, vocab_size=VOCAB, seed=1)[0])
    groups.destroy()
    return sum(parameter.numel() for parameter in stage.parameters())


LAYOUTS = [ParallelConfig(tensor=2), ParallelConfig(pipeline=2)]


def counts_of_two_ranks(rank, models):
    return [count(model, parallel, rank) for model in models for parallel in LAYOUTS]


def test_parameters_of_two_ranks(tmp_path):
    plain = small(tmp_path).model
    tied = replace(plain, tied_embeddings=True, qkv_bias=True, qk_norm=True)
    counted = run_ranks(counts_of_two_ranks, 2, tmp_path, [plain, tied])
    for rank, found in enumerate(counted):
        expected = [
            stage_parameters(
                model, parallel, vocab_size=VOCAB, stage=rank if parallel.pipeline > 1 else 0
            )
            for model in (plain, tied)
            for parallel in LAYOUTS
        ]
        assert found == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_gradients_and_optimizer(dtype, tmp_path):
    config = small(tmp_path, model__dtype=dtype)
    with layout(config):
        policy = build_policy(config, config.optimizer, VOCAB)
        (chunk,) = policy.model
        buffers = chunk.buffers
        held = {
            "weights": sum(p.numel() * p.element_size() for p in chunk.parameters()),
            "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        }
        for buffer in buffers:
            buffer.grad_data.fill_(1e-3)
        policy.optimizer.step()
        held["optimizer"] = optimizer_state(policy.optimizer)
    expected = estimate(config, VOCAB, replicas=1)
    assert held["weights"] == expected.weights
    # Megatron pads its buffer to a multiple of 64 elements a parameter, Adam counts its steps.
    assert held["gradients"] == pytest.approx(expected.gradients, rel=0.02)
    assert held["optimizer"] == pytest.approx(expected.optimizer, rel=0.02)
    saved = expected.weights + expected.optimizer
    # Megatron's distributed optimizer saves its fp32 weights also if they are the model's own.
    saved += expected.weights if dtype == "fp32" else 0
    assert checkpoint_bytes(config, VOCAB) == saved == host_estimate(config, VOCAB, 1).save


def optimizer_state(optimizer) -> int:
    """Bytes of the moments, and of master weights that are not the model's own."""
    (part,) = optimizer.chained_optimizers
    adam = part.optimizer
    tensors = [t for state in adam.state.values() for t in state.values() if t.numel() > 1]
    if part.config.bf16:
        tensors += [p for group in adam.param_groups for p in group["params"]]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("limit", [None, 50, 1000])
def test_the_cache(tmp_path, limit):
    """Eight sequences of the whole context, and what a limit leaves of that."""
    settings = {} if limit is None else {"rollout__max_cache_tokens": limit}
    config = small(tmp_path, rollout__max_batch=8, **settings)
    with layout(config):
        model = build_model(config.model, config.parallel, vocab_size=VOCAB, seed=1)
        longest = config.model.max_length
        blocks = Blocks.within(limit, sequences=8, at_once=8, longest=longest)
        cache = new_cache(decoders(model), blocks.total)
        held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    expected = estimate(config, VOCAB, replicas=1, device=CPU).cache
    block = held / (blocks.total + 1)
    assert abs(held - expected) <= (0 if limit is None else block)


def packed_elements(model) -> list[int]:
    """The elements of each packed weight of a rank."""
    found = []
    for decoder in decoders(model):
        weights = [w for layer in decoder._layers for w in vars(layer).values()]
        found += [w.numel() for w in (*weights, decoder._output) if w is not None and w.is_mkldnn]
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_packed_weights(dtype, tmp_path):
    """fc1 and fc2 of two layers, and the output projection; the other matrices are small."""
    config = small(
        tmp_path, model__dtype=dtype, model__hidden=512, model__ffn_hidden=512, model__heads=4,
        model__kv_heads=1, model__head_dim=32, model__layers=2,
    )  # fmt: skip
    vocab_size = 600  # padded to 640
    with layout(config):
        packed = packed_elements(
            build_model(config.model, config.parallel, vocab_size=vocab_size, seed=1)
        )
    by_hand = [2 * 512 * 512, 512 * 512] * 2 + [640 * 512]
    assert packed == (by_hand if dtype == "fp32" else [])
    assert estimate(config, vocab_size, replicas=1, device=CPU).packed == 4 * sum(packed)
    assert estimate(config, vocab_size, replicas=1).packed == 0


TWO_RANKS = [{"parallel__tensor": 2}, {"parallel__pipeline": 2}]


def packed_on_two_ranks(rank, folder) -> list[tuple[int, int]]:
    """(bytes of the packed copies of this rank, what the estimate says) on each layout; with tied
    embeddings too, of which the output side is packed."""
    decode_sizes.SMALLEST_PACKED, found = 1000, []  # in this process
    for settings in TWO_RANKS:
        for tied in (False, True):
            config = small(folder, model__tied_embeddings=tied, **settings)
            with layout(config):
                model = build_model(config.model, config.parallel, vocab_size=VOCAB, seed=1)
                held = 4 * sum(packed_elements(model))
            stage = rank if config.parallel.pipeline > 1 else 0
            expected = stage_estimate(config, VOCAB, replicas=1, stage=stage, device=CPU)
            found.append((held, expected.packed))
    return found


def test_packed_weights_of_two_ranks(tmp_path):
    for found in run_ranks(packed_on_two_ranks, 2, tmp_path, tmp_path):
        for held, expected in found:
            assert held == expected > 0


def test_the_cache_leaves_room_on_every_stage(tmp_path, monkeypatch):
    """The last stage packs the output projection; the first holds more in the update."""
    monkeypatch.setattr(decode_sizes, "SMALLEST_PACKED", 1)
    config = small(tmp_path, parallel__pipeline=2)
    first, last = stage_estimates(config, VOCAB, replicas=1, device=CPU)
    assert first.packed < last.packed and first.total >= last.total
    monkeypatch.setattr(devices, "total_memory_of_rank", lambda: 10**8)
    monkeypatch.setattr(groups, "data_size", lambda: 1)
    monkeypatch.setattr(groups, "reduce_sums", lambda values, *_: values)
    left = 0.8 * 10**8 - last.resident - last.prefill - last.packed
    assert max_cache_tokens(config, VOCAB) == int(left / (2 * 2 * 2 * 8 * 4))  # two layers


def test_the_default_size_of_the_cache_follows_from_the_machine(tmp_path, monkeypatch):
    """Not from the free memory, or a resumed run would decode other batches."""
    config = small(tmp_path)
    need = estimate(config, VOCAB, replicas=1, device=CPU)
    each = 4 * 2 * 2 * 8 * 4  # layers, keys and values, heads, channels, bytes
    with layout(config):
        monkeypatch.setattr(devices, "total_memory_of_rank", lambda: 10**8)
        left = 0.8 * 10**8 - need.resident - need.prefill
        assert max_cache_tokens(config, VOCAB) == int(left / each)
        monkeypatch.setattr(devices, "total_memory_of_rank", lambda: 1)
        assert max_cache_tokens(config, VOCAB) == config.model.max_length
        set_by_user = small(tmp_path, rollout__max_cache_tokens=77)
        assert max_cache_tokens(set_by_user, VOCAB) == 77


def written_bytes(rank, folder, settings) -> tuple[int, int]:
    """(bytes of the tensors that this rank writes in a save, what the estimate says)."""
    config = config_of(folder, folder, model__vocab_size=VOCAB, **settings)
    with layout(config):
        policy = build_policy(config, config.optimizer, VOCAB)
        pending = checkpoint.save(policy, RunState(), config.checkpoint)
        pending.publish()
        saved = checkpoint.newest(config.checkpoint.dir)
        written = sum(path.stat().st_size for path in saved.glob(f"__{rank}_*"))
        return written, host_estimate(config, VOCAB, groups.data_size()).save


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_save_copies_what_a_rank_writes(dtype, tmp_path):
    """Two replicas share the weights, and each writes its own part of Adam's state."""
    wide = {"model__hidden": 256, "model__ffn_hidden": 768, "model__dtype": dtype}
    for written, expected in run_ranks(written_bytes, 2, tmp_path, tmp_path, wide):
        assert written == pytest.approx(expected, rel=0.1)  # weights are shared in whole tensors


def test_what_layouts_save(tmp_path):
    """By hand: Adam is sharded over replicas and context ranks; 1F1B holds a row for each stage."""
    whole = estimate(small(tmp_path), VOCAB, replicas=1)
    assert estimate(small(tmp_path), VOCAB, replicas=4).optimizer == whole.optimizer // 4
    shared = small(tmp_path, parallel__context=2)
    assert estimate(shared, VOCAB, replicas=2).optimizer == whole.optimizer // 4
    assert estimate(shared, VOCAB, replicas=2).activations == whole.activations // 2
    offloaded = small(tmp_path, reference__placement="offload")
    assert estimate(offloaded, VOCAB, 1).reference == 0
    assert host_estimate(offloaded, VOCAB, 1).reference == whole.reference == whole.weights
    assert host_estimate(offloaded, VOCAB, 4).save == host_estimate(offloaded, VOCAB, 1).save // 4


def test_rows_in_flight():
    """By hand; interleaved, p + (p - 1) / v rows on the first stage."""
    four = ParallelConfig(pipeline=4)
    assert [rows_in_flight(four, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert rows_in_flight(replace(four, virtual_pipeline=2)) == 4 + 3 / 2
