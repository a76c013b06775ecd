"""Generation in recorded graphs, with a recorder in the place of CUDA's.

`Recorder` keeps every operation of a pass with its tensors. A replay runs the same operations on the
same memory, as a CUDA graph does: whatever Python computed from values is frozen.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rpp.config import ModelConfig, ParallelConfig
from megatron_rpp.model import attention_metadata, build, cuda_graphs
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.records import Request, Sampling
from megatron_rpp.rollout.engine import MegatronEngine

MODEL = ModelConfig(
    layers=2, hidden=32, ffn_hidden=48, heads=4, kv_heads=2, max_length=48, init_std=0.3
)
REQUESTS = [Request(tuple(range(1 + i % 3, 6 + i % 4)), i) for i in range(12)]


class Recorder(TorchDispatchMode):
    """Records operations, and repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, before in self.calls:
            after = function(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tokens:
    """As much of a tokenizer as the engine asks for without stop texts."""

    eos_ids = (49, 48, 47)


@pytest.fixture(scope="module")
def model():
    groups.start(1, 1, seed=7)
    torch.set_num_threads(1)
    yield build.build_model(MODEL, ParallelConfig(), vocab_size=50, seed=3)
    groups.stop()


@pytest.fixture
def recorders(monkeypatch):
    """As on a GPU, without its kernels; the recorders in the order of their making."""
    made = []

    def new():
        made.append(Recorder())
        return made[-1]

    @contextmanager
    def record(recorder, pool, *, capture_error_mode):
        with recorder:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(attention_metadata, "block_size", lambda: 8)
    monkeypatch.setattr(devices, "padded_batch", lambda count: -(-count // 4) * 4)
    for name, value in {"has_cuda_graphs": True, "scans_cache": False}.items():
        monkeypatch.setattr(devices, name, lambda value=value: value)
    monkeypatch.setattr(devices, "tokens_per_sync", lambda: 3)
    return made


def generate(model):
    engine = MegatronEngine(model, Tokens(), max_batch=5)
    return engine.generate(REQUESTS, Sampling(max_new_tokens=30), seed=4, step=2)


def same(found, expected):
    assert [g.tokens for g in found] == [g.tokens for g in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_replays_give_the_tokens_of_plain_passes(model, recorders, monkeypatch):
    monkeypatch.setattr(devices, "has_cuda_graphs", lambda: False)
    expected = generate(model)
    assert len({len(generation.tokens) for generation in expected}) > 3 and not recorders
    monkeypatch.setattr(devices, "has_cuda_graphs", lambda: True)
    same(generate(model), expected)
    rows, lengths = 2, 5  # 4 or 8 rows; 8, 16 .. 40 positions
    assert 2 <= len(recorders) <= rows * lengths
    assert sum(recorder.replays for recorder in recorders) > 3 * len(recorders)


def test_a_pass_that_cannot_be_recorded_runs_as_usual(model, recorders, monkeypatch, caplog):
    @contextmanager
    def fail(recorder, pool, *, capture_error_mode):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(devices, "has_cuda_graphs", lambda: False)
    expected = generate(model)
    monkeypatch.setattr(devices, "has_cuda_graphs", lambda: True)
    monkeypatch.setattr(torch.cuda, "graph", fail)
    restored = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "own stream")
    monkeypatch.setattr(torch.cuda, "set_stream", restored.append)
    with caplog.at_level(logging.WARNING, cuda_graphs.__name__):
        same(generate(model), expected)
    assert [record.message for record in caplog.records] == [
        "generation without CUDA graphs: operation not permitted when stream is capturing"
    ]
    assert restored == ["own stream"]
