"""Which kernels compute RMSNorm, rotary positions and SwiGLU in training, for the start-up log.

In generation, PyTorch computes all three (decoder.py)."""

from __future__ import annotations

import torch

from megatron_rpp.model.language_model import chunks

_ENGINE, _TORCH = "TransformerEngine", "PyTorch"


def describe(model: torch.nn.ModuleList) -> str:
    """One line; "PyTorch" means its single operations, for RMSNorm on a GPU one of them."""
    config = chunks(model)[0].config
    engine = config.transformer_impl == "transformer_engine"
    rotary = _ENGINE if config.apply_rope_fusion else _TORCH
    compiled = "torch.compile" if config.bias_activation_fusion else _TORCH
    return (
        f"kernels: RMSNorm {_ENGINE if engine else _TORCH}, rotary positions {rotary}, "
        f"SwiGLU {compiled}"
    )
