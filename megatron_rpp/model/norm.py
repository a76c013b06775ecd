"""RMSNorm (arXiv 1910.07467) that works under sequence parallelism.

Megatron-Core's torch fallback does not support it. Under sequence parallelism each tensor-parallel
rank normalises its part of the sequence, so the weight's gradient is a partial sum. The attribute
`sequence_parallel` makes Megatron all-reduce it over the tensor-parallel group.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_rpp.parallel import device as devices

from megatron.core.transformer import TransformerConfig


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension [..., h]."""
    if x.dtype != torch.float32 or devices.fuses_rms_norm():
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    if not torch.is_grad_enabled():
        return _normed(x, weight, _scale(x, eps))
    normed = _RMSNorm.apply(x, weight, eps)
    assert isinstance(normed, torch.Tensor)
    return normed


def _scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x²) + eps), [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


def _normed(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x * scale).mul_(weight)


class _RMSNorm(torch.autograd.Function):
    """With fewer passes over memory than PyTorch's composite operation."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # noqa: PLR0917 (autograd calls it by position)
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return _normed(x, weight, scale)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        normed, weighted = x * scale, gradient * weight
        share = torch.linalg.vecdot(weighted, normed).div_(x.shape[-1])[..., None]
        to_x = weighted.addcmul_(normed, share, value=-1).mul_(scale)
        to_weight = normed.mul_(gradient).flatten(0, -2).sum(0)
        return to_x, to_weight, None


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=devices.device())
        self.eps = eps
        self.weight = torch.nn.Parameter(weight)
        # Megatron reads this attribute of a parameter; torch does not declare it.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
