"""A model in training, policy, critic or reward model: what an update changes and a checkpoint saves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rpp.parallel import device as _device  # noqa: F401  (before megatron)

from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(frozen=True)
class TrainedModel:
    """The chunks of a model, DDP-wrapped, with their optimizer and learning-rate schedule."""

    model: torch.nn.ModuleList
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
