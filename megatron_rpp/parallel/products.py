"""Matrix products whose kernel depends on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_rpp.parallel import device as devices

LARGE_WEIGHT = 2**18
"""Elements; 1 MB in fp32."""


def matmul_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left · right, [n, h] · [h, m], summed and returned in fp32 even if the factors are bf16."""
    if left.dtype == torch.float32:
        return left @ right
    if devices.ON_CPU:
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """rows · weightᵀ + bias, [n, h] · [h, m], without gradients, for few rows.

    On a CPU, F.linear calls MKL for fp32. For few rows and large weights, oneDNN is faster, most of all
    with several threads.
    """
    large = weight.dtype == torch.float32 and weight.numel() >= LARGE_WEIGHT
    if large and devices.ON_CPU and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


def linear_fp32(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `linear`; summed and returned in fp32 even if the factors are bf16."""
    if weight.dtype == torch.float32:
        return linear(rows, weight)
    return matmul_fp32(rows, weight.t())
