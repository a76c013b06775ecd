"""Rotary position embeddings (Su et al., arXiv 2104.09864), with Llama 3's scaling.

Megatron-Core implements this scaling with fixed constants; here they come from the model's config. Its
unfused rotation computes cosines and sines in every layer, and takes about twice as many passes over
queries and keys.

Shape legend: t tokens, d head size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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


class Rotation(NamedTuple):
    """How far each token's channels are rotated.

    Channel i and its partner i + d/2 are the plane in which (x, y) becomes (x c - y s, y c + x s).
    """

    cosines: torch.Tensor
    """[t, d]."""
    sines: torch.Tensor
    """[t, d]: -s in the first half of the channels, s in the second."""

    @classmethod
    def of(cls, angles: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """angles: [t, d] fp32, equal in both halves."""
        sign = torch.ones(angles.shape[-1], device=angles.device)
        sign[: len(sign) // 2] = -1
        return cls(angles.cos().to(dtype), (angles.sin() * sign).to(dtype))

    def at(self, positions: torch.Tensor | slice) -> Rotation:
        """The rows of these positions, to rotate [t, heads, d] or [t, b, heads, d]."""
        return Rotation(*(table[positions] for table in self))

    def rotate(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotates [t, ..., d]."""
        shape = (len(self.cosines), *(1,) * (heads.dim() - 2), heads.shape[-1])
        cosines, sines = self.cosines.view(shape), self.sines.view(shape)
        if not heads.requires_grad:
            return _rotated(heads, cosines, sines)
        rotated = _Rotate.apply(heads, cosines, sines)
        assert isinstance(rotated, torch.Tensor)
        return rotated


def _rotated(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(heads * cosines, heads.roll(heads.shape[-1] // 2, -1), sines)


class _Rotate(torch.autograd.Function):
    """The gradient is rotated back: by the same cosines and the opposite sines."""

    @staticmethod
    def forward(ctx, heads, cosines, sines):  # noqa: PLR0917 (autograd calls it by position)
        ctx.save_for_backward(cosines, sines)
        return _rotated(heads, cosines, sines)

    @staticmethod
    def backward(ctx, gradient):
        cosines, sines = ctx.saved_tensors
        return _rotated(gradient, cosines, -sines), None, None
