"""Matrix products whose kernel depends on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_rpp.parallel import device as devices


def matmul_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left · right, [n, h] · [h, m], summed and returned in fp32 even if the factors are bf16."""
    if left.dtype == torch.float32:
        return left @ right
    if devices.ON_CPU:
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def packed(weight: torch.Tensor) -> torch.Tensor:
    """A copy of an fp32 weight in the order of oneDNN's kernels on a CPU, for `linear`; on another
    device, and of another type, the weight itself.

    Without it, oneDNN reorders the weight at every product, which is costly if there are few rows.
    """
    if devices.ON_CPU and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return weight


def linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """rows · weightᵀ + bias, [n, h] · [h, m]; without gradients if the weight is `packed`."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


def linear_fp32(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `linear`; summed and returned in fp32 even if the factors are bf16."""
    if weight.dtype == torch.float32:
        return linear(rows, weight)
    return matmul_fp32(rows, weight.t())
