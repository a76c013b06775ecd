"""Communication between data-parallel ranks while the model computes, by Megatron's DDP.

Gradients are reduced bucket by bucket during the backward pass. With the distributed optimizer, each
rank updates its shard of the weights; the shards are gathered bucket by bucket during the next forward
pass. Hooks that run before a module's forward wait for the weights of that module. So a weight is whole
on every rank

- inside `pipeline.train`, once the forward pass has reached its module. The head's weight is read
  outside of any module's forward (logprobs.py), so `finish_gathers` waits for it;
- everywhere else after `complete_weights`.

Left out: gathers that all pipeline stages start together (`align_param_gather`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rpp.config import ParallelConfig
from megatron_rpp.parallel import device as devices

from megatron.core.distributed import DistributedDataParallel


@dataclass(frozen=True)
class Overlap:
    """Which communication runs while the model computes."""

    grad_reduce: bool
    param_gather: bool

    @classmethod
    def of(cls, parallel: ParallelConfig, distributed_optimizer: bool) -> Overlap:
        """What the settings mean on this device; null = where there is a GPU."""
        grad_reduce, param_gather = parallel.overlap_grad_reduce, parallel.overlap_param_gather
        if grad_reduce is None:  # buckets exist only if it is on, and the gather needs them
            grad_reduce = param_gather or not devices.ON_CPU
        if param_gather is None:
            param_gather = not devices.ON_CPU
        return cls(grad_reduce, param_gather and grad_reduce and distributed_optimizer)


def _gathering(model: torch.nn.Module) -> list[DistributedDataParallel]:
    """The chunks whose weights are gathered during the forward pass."""
    chunks = [chunk for chunk in model.children() if isinstance(chunk, DistributedDataParallel)]
    return [chunk for chunk in chunks if chunk.use_forward_hook]


def begin_training(model: torch.nn.ModuleList) -> None:
    """Lets forward passes of `model` gather the weights, until `complete_weights`."""
    for chunk in _gathering(model):
        if not chunk.remove_forward_pre_hook_handles:
            chunk.enable_forward_pre_hook()


def finish_gathers(model: torch.nn.ModuleList) -> None:
    """Waits for what the last chunk's forward pass has not waited for: the weight of the head."""
    for chunk in _gathering(model)[-1:]:
        for group in reversed(chunk.bucket_groups):  # in the order of the forward pass
            group.finish_param_sync()


def complete_weights(model: torch.nn.ModuleList) -> None:
    """Makes every weight whole on every rank, if `model` was trained since the last call. Collective.

    Other readers than `pipeline.train` come after it: generation, log-probs, the exchange with a
    reference, a save.
    """
    for chunk in _gathering(model):
        if chunk.remove_forward_pre_hook_handles:
            chunk.disable_forward_pre_hook(param_sync=True)


def are_weights_complete(model: torch.nn.Module) -> bool:
    """Whether a rank may read the weights of `model` outside of `pipeline.train`."""
    return not any(chunk.remove_forward_pre_hook_handles for chunk in _gathering(model))
