"""Transport ipc: buckets of tensors in the memory of the same GPU.

Every rank gathers each tensor and fills a buffer on its GPU. The worker on the same GPU maps that buffer
and copies its part. Between a rollout and the next push the server sleeps: its weights and its cache are
dropped, and the GPU's memory is free for training.

Written from vLLM's source; it has not run on GPUs.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor

from megatron_rpp.model import hf_tensors
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import gpu_sharing, groups, progress_wait
from megatron_rpp.rollout.vllm.api import Server
from megatron_rpp.rollout.vllm.buckets import Bucket, dtype_name, fill, plan_of
from megatron_rpp.rollout.vllm.pushing import Problems, Push


class SameGpu:
    """Transport ipc."""

    keeps_weights = False

    def __init__(self, shares: bool, seconds: float):
        """
        Args:
            shares: whether a worker runs on the GPU of this rank.
            seconds: time limit of one push, and of putting the servers to sleep.
        """
        self._shares, self._seconds = shares, seconds

    def push(
        self,
        model: torch.nn.Module,
        servers: Mapping[int, Server],
        version: str,
        *,
        stop: Callable[[], bool],
    ) -> Problems:
        """See Transport. The servers wake up for it."""
        gpu_sharing.free_cached_memory()
        progress_wait.wait_for_all(idle=stop)
        push = Push(servers, seconds=self._seconds, stop=stop)
        push.on_all(lambda server: push.ask(server, "/wake_up?tags=weights"))
        push.on_all(push.start_update)
        buckets, dtype = plan_of(model)
        tensors = hf_tensors.on_every_rank(model)
        with gpu_sharing.shareable_allocations():
            largest = max(bucket.bytes for bucket in buckets)
            buffer = torch.empty(largest, dtype=torch.uint8, device=devices.device())
        # A handle that nobody opens would keep the buffer for good.
        handle = {gpu_sharing.uuid(): reduce_tensor(buffer)[1]} if self._shares else {}
        progress_wait.wait_for_all(idle=stop)
        handles: dict[str, tuple] = {}
        for other in groups.gather_objects(handle, dist.group.WORLD):
            handles |= other
        for bucket in buckets:
            fill(buffer, bucket, tensors)
            devices.synchronize()
            progress_wait.wait_for_all(idle=stop)
            info = _ipc_info(bucket, dtype, handles, last=bucket is buckets[-1])
            push.on_all(partial(push.send, info=info))
            progress_wait.wait_for_all(idle=stop)  # before the buffer is filled again
        push.on_all(lambda server: self._finish(push, server, version))
        del buffer
        gpu_sharing.free_shared_memory()
        return push.problems

    def _finish(self, push: Push, server: Server, version: str) -> None:
        push.finish_update(server, version)
        push.ask(server, "/wake_up?tags=kv_cache")
        push.resume(server, version)

    def rest(self, servers: Mapping[int, Server], *, stop: Callable[[], bool]) -> Problems:
        """Puts the servers to sleep: they drop their weights and their cache. Returns on all ranks
        when all of them sleep, because the memory that training needs is theirs until then."""
        push = Push(servers, seconds=self._seconds, stop=stop)
        push.on_all(lambda server: push.ask(server, "/sleep?level=2"))
        progress_wait.wait_for_all(idle=stop)
        return push.problems


def _ipc_info(
    bucket: Bucket, dtype: torch.dtype, handles: dict[str, tuple], *, last: bool
) -> dict[str, Any]:
    """The content of /update_weights: where each GPU's buffer is, and what is in it."""
    return {
        "names": bucket.names,
        "shapes": bucket.shapes,
        "dtype_names": [dtype_name(dtype)] * len(bucket.names),
        "tensor_sizes": [torch.Size(shape).numel() * dtype.itemsize for shape in bucket.shapes],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
        "last": last,
    }
