"""Transports that send tensors in buckets from GPU to GPU: nccl and ipc.

    nccl   The main rank gathers each tensor and broadcasts buckets of them in a process group of its
           own with all workers of all servers. Workers wait in a call of /update_weights meanwhile.
    ipc    Every rank gathers each tensor and fills a buffer on its GPU. The worker on the same GPU maps
           that buffer and copies its part. Between a rollout and the next push the server sleeps: its
           weights and its cache are dropped, and the GPU's memory is free for training.

Both are written from vLLM's source and have not run on GPUs; the broadcast has run with gloo.
"""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor

from megatron_rpp.hf.families import Row
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model import hf_tensors
from megatron_rpp.model.language_model import chunks
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import gpu_sharing, groups, progress_wait
from megatron_rpp.rollout.vllm.api import Server
from megatron_rpp.rollout.vllm.weights import Problems, ask_all, update_all

BUCKET_BYTES = 2**29
"""Most bytes of a bucket, unless a single parameter has more."""


@dataclass(frozen=True)
class Bucket:
    """Tensors that are sent together."""

    rows: int
    """How many of Megatron's parameters they make up."""
    names: list[str]
    shapes: list[list[int]]
    bytes: int


def plan(rows: list[Row], settings: dict[str, Any], width: int) -> list[Bucket]:
    """The buckets of a model with these rows; `width` is the size of one value in bytes."""
    found: list[Bucket] = []
    names: list[str] = []
    shapes: list[list[int]] = []
    count = size = 0
    for row in rows:
        sizes = row.sizes(settings)
        more = width * sum(torch.Size(shape).numel() for shape in sizes)
        if count and size + more > BUCKET_BYTES:
            found.append(Bucket(count, names, shapes, size))
            names, shapes, count, size = [], [], 0, 0
        names += row.hf
        shapes += [list(shape) for shape in sizes]
        count, size = count + 1, size + more
    return [*found, Bucket(count, names, shapes, size)]


def _plan(model: torch.nn.Module) -> tuple[list[Bucket], torch.dtype]:
    dtype = next(model.parameters()).dtype
    settings = chunks(model)[0].architecture
    return plan(hf_tensors.all_rows(model), settings, dtype.itemsize), dtype


def _fill(buffer: torch.Tensor, bucket: Bucket, tensors: Iterator[hf_tensors.Tensors]) -> None:
    """Copies the next tensors into `buffer`, uint8, end to end."""
    start = 0
    for _ in range(bucket.rows):
        heartbeat.current.beat()
        for _, tensor in next(tensors):
            flat = tensor.view(-1).view(torch.uint8)
            buffer[start : start + len(flat)].copy_(flat)
            start += len(flat)
    assert start == bucket.bytes, (start, bucket.bytes)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Broadcast:
    """Transport nccl. After a failure all servers are lost: the group cannot be used again."""

    def __init__(self, workers: int, tensor: int, seconds: float):
        """
        Args:
            workers: workers of all servers together.
            tensor: workers of each server.
            seconds: time limit of one push.
        """
        self._workers, self._tensor, self._seconds = workers, tensor, seconds
        self._group: Any = None  # a Backend, whose type does not list its methods
        self._store: dist.TCPStore | None = None
        self._members: list[tuple[int, str]] = []

    def push(
        self,
        model: torch.nn.Module,
        servers: Mapping[int, Server],
        version: str,
        *,
        idle: Callable[[], object],
    ) -> Problems:
        """See Transport."""
        problems = self._connect(servers)
        if not groups.on_any(bool(problems)):
            problems = self._send(model, servers, version)
        progress_wait.wait_for_all(idle=idle)
        if groups.on_any(bool(problems)):
            self._members = []
            return {n: "the broadcast of new weights failed" for n in servers} | problems
        return {}

    def rest(self, servers: Mapping[int, Server]) -> bool:
        """The servers keep their weights."""
        return False

    def _connect(self, servers: Mapping[int, Server]) -> Problems:
        """Makes the process group, unless it is there and has the same servers."""
        own = [(number, server.address) for number, server in servers.items()]
        gathered = groups.gather_objects(own, dist.group.WORLD)
        members = [member for part in gathered for member in part]
        if members == self._members:
            return {}
        self._members = members
        if groups.is_main():
            self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        port = groups.broadcast_object(self._store.port if self._store else None)
        common = {
            "host": os.environ.get("MASTER_ADDR", "127.0.0.1"), "port": port,
            "world_size": 1 + self._workers, "backend": devices.backend(),
            "seconds": self._seconds,
        }  # fmt: skip

        def join(server: Server, first_rank: int) -> None:
            info = common | {"first_rank": first_rank}
            server.ask("/init_weight_transfer_engine", {"init_info": info}, timeout=self._seconds)

        first = {server.address: 1 + number * self._tensor for number, server in servers.items()}
        with ThreadPoolExecutor(1) as side:
            asked = side.submit(
                ask_all, servers, lambda server: join(server, first[server.address])
            )
            if groups.is_main():
                self._group = self._own_group()
            return asked.result()

    def _own_group(self) -> Any:
        assert self._store is not None
        size, limit = 1 + self._workers, timedelta(seconds=self._seconds)
        if devices.ON_CPU:
            return dist.ProcessGroupGloo(self._store, 0, size, limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(self._store, 0, size, options)

    def _send(
        self, model: torch.nn.Module, servers: Mapping[int, Server], version: str
    ) -> Problems:
        buckets, dtype = _plan(model)

        def receive(server: Server) -> None:
            for bucket in buckets:
                info = {
                    "names": bucket.names, "shapes": bucket.shapes,
                    "dtypes": [_dtype_name(dtype)] * len(bucket.names),
                    "last": bucket is buckets[-1],
                }  # fmt: skip
                server.ask("/update_weights", {"update_info": info}, timeout=self._seconds)

        with ThreadPoolExecutor(1) as side:  # NCCL on the main thread, HTTP on others
            asked = side.submit(update_all, servers, version, receive, seconds=self._seconds)
            if groups.data_rank() == 0 and groups.context_group().rank() == 0:
                self._broadcast(model, buckets)
            return asked.result()

    def _broadcast(self, model: torch.nn.Module, buckets: list[Bucket]) -> None:
        """Gathers on the ranks of one copy of the model; sends from the main one."""
        tensors = hf_tensors.on_every_rank(model)
        for bucket in buckets:
            buffer = torch.empty(bucket.bytes, dtype=torch.uint8, device=devices.device())
            _fill(buffer, bucket, tensors)
            if groups.is_main():
                self._group.broadcast(buffer, 0).wait()
        devices.synchronize()


class SameGpu:
    """Transport ipc."""

    def __init__(self, shares: bool, seconds: float):
        """
        Args:
            shares: whether a worker runs on the GPU of this rank.
            seconds: time limit of each call.
        """
        self._shares, self._seconds = shares, seconds

    def push(
        self,
        model: torch.nn.Module,
        servers: Mapping[int, Server],
        version: str,
        *,
        idle: Callable[[], object],
    ) -> Problems:
        """See Transport. The servers wake up for it."""
        gpu_sharing.free_cached_memory()
        progress_wait.wait_for_all(idle=idle)
        problems = ask_all(servers, self._begin)
        buckets, dtype = _plan(model)
        tensors = hf_tensors.on_every_rank(model)
        with gpu_sharing.shareable_allocations():
            largest = max(bucket.bytes for bucket in buckets)
            buffer = torch.empty(largest, dtype=torch.uint8, device=devices.device())
        # A handle that nobody opens would keep the buffer for good.
        handle = {gpu_sharing.uuid(): reduce_tensor(buffer)[1]} if self._shares else {}
        handles: dict[str, tuple] = {}
        for other in groups.gather_objects(handle, dist.group.WORLD):
            handles |= other
        for bucket in buckets:
            _fill(buffer, bucket, tensors)
            devices.synchronize()
            progress_wait.wait_for_all(idle=idle)
            healthy = {n: server for n, server in servers.items() if n not in problems}
            info = _ipc_info(bucket, dtype, handles, last=bucket is buckets[-1])
            problems |= ask_all(healthy, partial(self._load, info=info))
            progress_wait.wait_for_all(idle=idle)  # before the buffer is filled again
        healthy = {n: server for n, server in servers.items() if n not in problems}
        problems |= ask_all(healthy, partial(self._finish, version=version))
        del buffer
        gpu_sharing.free_shared_memory()
        return problems

    def rest(self, servers: Mapping[int, Server]) -> bool:
        """Puts the servers to sleep: they drop their weights and their cache."""
        ask_all(servers, lambda server: server.ask("/sleep?level=2", timeout=self._seconds))
        return True

    def _begin(self, server: Server) -> None:
        server.ask("/wake_up?tags=weights", timeout=self._seconds)
        server.begin_update(self._seconds)

    def _load(self, server: Server, *, info: dict[str, Any]) -> None:
        server.ask("/update_weights", {"update_info": info}, timeout=self._seconds)

    def _finish(self, server: Server, *, version: str) -> None:
        server.finish_update(version, self._seconds)
        server.ask("/wake_up?tags=kv_cache", timeout=self._seconds)
        server.resume(version, self._seconds)


def _ipc_info(
    bucket: Bucket, dtype: torch.dtype, handles: dict[str, tuple], *, last: bool
) -> dict[str, Any]:
    """The content of /update_weights: where each GPU's buffer is, and what is in it."""
    return {
        "names": bucket.names,
        "shapes": bucket.shapes,
        "dtype_names": [_dtype_name(dtype)] * len(bucket.names),
        "tensor_sizes": [torch.Size(shape).numel() * dtype.itemsize for shape in bucket.shapes],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
        "last": last,
    }
