"""Select under a mask, and keep NaN out of gradients.

A tensor [B, T] holds rubbish where its mask is False: padding, prompts, tool output, log-probs
that nobody computed. Multiplying by the mask does not remove it (0 * NaN = NaN), so every function
of this room selects. Left out: masked means, because a mean over a batch needs its numerator and
its count reduced over the ranks first (see ``losses.aggregate``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

# exp(20) = 5e8: far beyond any clip range, and its product with an advantage is finite. Past it
# a probability ratio is constant (verl clamps the same way).
MAX_LOG_RATIO = 20.0


def check_mask(mask: Tensor, *tensors: Tensor) -> None:
    """Assert that ``mask`` is bool and that every tensor has its shape (no silent broadcast)."""
    assert mask.dtype == torch.bool, f"mask must be bool, not {mask.dtype}"
    for tensor in tensors:
        assert tensor.shape == mask.shape, f"shape {tuple(tensor.shape)}, mask {tuple(mask.shape)}"


def select(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` where ``mask`` is True, exactly 0 elsewhere, whatever was there (NaN, inf)."""
    return torch.where(mask, values, 0.0)


def on_collective_device(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``values`` where the collectives of ``group`` take them: NCCL's on this rank's GPU."""
    return values.cuda() if dist.get_backend(group) == "nccl" else values.cpu()


def at_least_fp32(values: Tensor) -> Tensor:
    """fp16 and bf16 become fp32 (a ratio near 1 has 8 bits in bf16); fp32 and fp64 stay."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def finite_gradient(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, elementwise, with gradient 0 wherever its value is not finite.

    Selecting the *result* of a nonlinear function is not enough: its backward multiplies the
    incoming 0 by an infinite or NaN derivative. So the inputs are replaced first, and the value
    that was not finite is put back as a constant: a mask can select it away, and without a mask
    it stays visible in the loss.
    """
    value = function(*(x.detach() for x in inputs))
    finite = value.isfinite()
    return torch.where(finite, function(*(select(x, finite) for x in inputs)), value)
