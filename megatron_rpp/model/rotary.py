"""Frequencies of rotary position embeddings (arXiv 2104.09864), with Llama 3's scaling.

Megatron-Core implements this scaling with fixed constants; here they come from the model's config.
"""

from __future__ import annotations

import math

import torch

from megatron_rpp.config.model import ModelConfig, RopeScalingConfig


def inverse_frequencies(model: ModelConfig) -> torch.Tensor:
    """Returns fp32 [head_dim / 2] radians per token for each pair of channels, on the CPU."""
    channels = model.head_dim or model.hidden // model.heads
    pairs = torch.arange(0, channels, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (model.rope_theta ** (pairs / channels))
    if model.rope_scaling.kind == "llama3":
        frequencies = _scaled(frequencies, model.rope_scaling)
    return frequencies


def _scaled(frequencies: torch.Tensor, scaling: RopeScalingConfig) -> torch.Tensor:
    """Scales long wavelengths by `factor` and short ones not at all, with a linear blend between."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_length / wavelengths  # rotations within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unscaled = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - unscaled) * frequencies / scaling.factor + unscaled * frequencies
