"""The memory of a rollout buffer."""

from __future__ import annotations

from dataclasses import fields

import torch

from megatron_rpp.rollout.buffer import RolloutBuffer


def nbytes(buffer: RolloutBuffer) -> int:
    """Bytes of all tensors of the buffer."""
    values = (getattr(buffer, field.name) for field in fields(buffer))
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
