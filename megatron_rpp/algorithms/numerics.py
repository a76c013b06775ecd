"""Selection under a mask, and gradients without NaN.

If the mask of a tensor [B, T] is False at a position, the value there is undefined: padding,
prompts, tool output, log-probs that were never computed. Multiplying by the mask does not remove it
(0 * NaN = NaN), so every function of this package selects. Left out: masked means, because for a
mean over a batch the numerator and the count must be reduced over the ranks first (see
``losses.aggregation_weights``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

# exp(20) = 5e8 is far beyond any clip range, and its product with an advantage is finite. Beyond it
# a probability ratio is constant (verl clamps the same way).
MAX_LOG_RATIO = 20.0


def check_mask(mask: Tensor, *tensors: Tensor) -> None:
    """Asserts that ``mask`` is bool and that every tensor has its shape (no silent broadcast)."""
    assert mask.dtype == torch.bool, f"mask must be bool, not {mask.dtype}"
    for tensor in tensors:
        assert tensor.shape == mask.shape, f"shape {tuple(tensor.shape)}, mask {tuple(mask.shape)}"


def select(values: Tensor, mask: Tensor) -> Tensor:
    """Returns ``values`` under ``mask`` and exactly 0 elsewhere, even for NaN and inf."""
    return torch.where(mask, values, 0.0)


def on_collective_device(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Moves ``values`` to the device that collectives of ``group`` need: the GPU for NCCL."""
    return values.cuda() if dist.get_backend(group) == "nccl" else values.cpu()


def at_least_fp32(values: Tensor) -> Tensor:
    """Converts fp16 and bf16 to fp32 (a ratio near 1 has 8 bits in bf16); keeps fp32 and fp64."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def finite_gradient(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Returns ``function(*inputs)``, elementwise, with gradient 0 if the value is not finite.

    Selecting the *result* of a nonlinear function is not enough: its backward multiplies the
    incoming 0 by an infinite or NaN derivative. So the inputs are replaced first, and a value that
    is not finite is put back as a constant. A mask can then leave it out; without a mask it stays
    visible in the loss.
    """
    value = function(*(x.detach() for x in inputs))
    finite = value.isfinite()
    return torch.where(finite, function(*(select(x, finite) for x in inputs)), value)
