"""Frequencies of rotary positions (arXiv 2104.09864), with Llama 3's stretching.

Megatron-Core has this scaling with fixed constants; here they are the model's own.
"""

from __future__ import annotations

import math

import torch

from megatron_rpp.config.model import ModelConfig, RopeScalingConfig


def inverse_frequencies(model: ModelConfig) -> torch.Tensor:
    """fp32 [head_dim / 2] radians per token of each pair of channels, on the CPU."""
    channels = model.head_dim or model.hidden // model.heads
    pairs = torch.arange(0, channels, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (model.rope_theta ** (pairs / channels))
    if model.rope_scaling.kind == "llama3":
        frequencies = _stretched(frequencies, model.rope_scaling)
    return frequencies


def _stretched(frequencies: torch.Tensor, scaling: RopeScalingConfig) -> torch.Tensor:
    """Long wavelengths by `factor`, short ones not at all, between them a linear blend."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_length / wavelengths  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
