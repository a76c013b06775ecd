"""Memory of this rank's GPU that other processes use too: vLLM's, with transport ipc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_rpp.parallel import device


def uuid() -> str:
    """The identity of this rank's GPU, which other processes see too."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def free_cached_memory() -> None:
    """Gives memory that the allocator keeps back to the GPU, for other processes on it."""
    torch.cuda.empty_cache()


@contextmanager
def shareable_allocations() -> Iterator[None]:
    """Allocations in the context can be mapped by other processes; those of expandable segments only
    by processes that may debug this one."""
    own = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    usual = device.ALLOCATOR if own is None else own
    if "expandable_segments:True" not in usual:
        yield
        return
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    try:
        yield
    finally:
        torch.cuda.memory._set_allocator_settings(usual)


def free_shared_memory() -> None:
    """Frees memory that other processes have mapped and let go."""
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()
