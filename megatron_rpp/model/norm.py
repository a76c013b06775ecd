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
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
