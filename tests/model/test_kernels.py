"""Which kernels are chosen, and that TransformerEngine's rotary kernel may take what it gets.

That kernel needs a GPU. In its place stands its equation, with the conditions that the real one checks
(transformer_engine_torch 2.20.2, csrc/extensions/apply_rope.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_rpp.config import ModelConfig, ParallelConfig
from megatron_rpp.model import build, kernels
from megatron_rpp.model.language_model import chunks
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.stages.logprobs import response_logprobs
from tests.rollout.test_buffer import make_buffer

from megatron.core.models.common.embeddings import rope_utils

MODEL = ModelConfig(layers=2, hidden=32, ffn_hidden=64, heads=4, max_length=32, init_std=0.2)


@pytest.fixture
def stage() -> Iterator[torch.nn.ModuleList]:
    groups.start(**ParallelConfig().sizes(), seed=1)
    yield build.build_model(MODEL, ParallelConfig(), vocab_size=50, seed=3)
    groups.stop()


def test_the_log_names_the_kernels(stage, monkeypatch):
    assert kernels.describe(stage) == (
        "kernels: RMSNorm PyTorch, rotary positions PyTorch, SwiGLU PyTorch"
    )
    monkeypatch.setattr(devices, "ON_CPU", False)  # a GPU without TransformerEngine
    config = build.transformer_config(MODEL, ParallelConfig())
    assert config.bias_activation_fusion and not config.apply_rope_fusion
    chunks(stage)[0].config = config
    assert "rotary positions PyTorch, SwiGLU torch.compile" in kernels.describe(stage)
    config.transformer_impl, config.apply_rope_fusion = "transformer_engine", True
    assert kernels.describe(stage) == (
        "kernels: RMSNorm TransformerEngine, rotary positions TransformerEngine, "
        "SwiGLU torch.compile"
    )


def fused_rope(t: torch.Tensor, freqs: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """What TransformerEngine's kernel does for "sbhd": row s of `t` is turned by the angles of s."""
    assert freqs.dim() == 4 and freqs.shape[1] == freqs.shape[2] == 1
    assert freqs.dtype == torch.float32 and t.shape[0] <= freqs.shape[0]
    assert t.shape[-1] == freqs.shape[-1] and not interleaved
    angles = freqs[: t.shape[0]]
    first, second = t.chunk(2, -1)
    return t * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def test_packed_rows_may_be_turned_by_the_fused_kernel(stage, monkeypatch):
    samples = [([1 + i, 2, 3][: 1 + i % 3], [4 + i, 5, 6, 7][: 2 + i % 2]) for i in range(5)]

    def logprobs() -> torch.Tensor:
        return response_logprobs(stage, make_buffer(samples), 16, temperature=1.0)

    calls = []

    def counted(t: torch.Tensor, freqs: torch.Tensor, interleaved: bool) -> torch.Tensor:
        calls.append(t.shape)
        return fused_rope(t, freqs, interleaved)

    plain = logprobs()
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", counted)
    chunks(stage)[0].config.apply_rope_fusion = True
    assert torch.allclose(logprobs(), plain, atol=1e-6)
    rows = len(calls) // (2 * MODEL.layers)  # queries and keys of each layer
    assert rows > 1 and len(calls) == rows * 2 * MODEL.layers
