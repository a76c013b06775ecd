"""Transport nccl: buckets of tensors, broadcast from GPU to GPU.

The main rank gathers each tensor and broadcasts buckets of them in a process group of its own with all
workers of all servers, which wait in a call of /update_weights meanwhile. It begins only if every
server has begun an update. If a server of the main rank fails meanwhile, the broadcast is ended at once;
if one of another rank does, at the time limit.

Written from vLLM's source; it has not run on GPUs, but with gloo.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_rpp.model import hf_tensors
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups, progress_wait
from megatron_rpp.rollout.vllm.api import Server
from megatron_rpp.rollout.vllm.buckets import Bucket, dtype_name, fill, plan_of
from megatron_rpp.rollout.vllm.pushing import Problems, Push

_POLL = 0.005
"""Seconds between two looks at a broadcast."""


class Broadcast:
    """Transport nccl. After a failure all servers are lost: the group cannot be used again."""

    keeps_weights = True

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
        stop: Callable[[], bool],
    ) -> Problems:
        """See Transport."""
        push = Push(servers, seconds=self._seconds, stop=stop)
        problem = self._connect(push, servers)
        if problem is None:
            push.on_all(push.start_update)
            problem = _first(push.over, push.stop)
        if problem is None:
            problem = self._send(push, model, version)
        if problem is None:
            return {}
        self._abandon()
        return {n: f"the broadcast of new weights failed: {problem}" for n in servers}

    def rest(self, servers: Mapping[int, Server], *, stop: Callable[[], bool]) -> Problems:
        """The servers keep their weights."""
        return {}

    def _abandon(self) -> None:
        self._members = []
        if self._group is not None:
            with suppress(RuntimeError):  # it may have failed already
                self._group.abort()
            self._group = None

    def _connect(self, push: Push, servers: Mapping[int, Server]) -> str | None:
        """Makes the process group, unless it is there and has the same servers. Returns what went
        wrong on any rank. Collective."""
        own = [(number, server.address) for number, server in servers.items()]
        gathered = groups.gather_objects(own, dist.group.WORLD)
        members = [member for part in gathered for member in part]
        if members == self._members:
            return None
        self._abandon()
        self._members = members
        if groups.is_main():
            self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        port = groups.broadcast_object(self._store.port if self._store else None)
        common = {
            "host": os.environ.get("MASTER_ADDR", "127.0.0.1"), "port": port,
            "world_size": 1 + self._workers, "backend": devices.backend(),
            "seconds": self._seconds,
        }  # fmt: skip
        first = {server.address: 1 + number * self._tensor for number, server in servers.items()}

        def join(server: Server) -> None:
            info = common | {"first_rank": first[server.address]}
            push.ask(server, "/init_weight_transfer_engine", {"init_info": info})

        push.begin(join)
        problem = None
        if groups.is_main():
            try:
                self._group = self._own_group()
            except (RuntimeError, ValueError) as error:  # such as a worker that does not come
                problem = f"{type(error).__name__}: {error}"
        push.finish()
        return _first(push.over or problem, push.stop)

    def _own_group(self) -> Any:
        assert self._store is not None
        size, limit = 1 + self._workers, timedelta(seconds=self._seconds)
        if devices.ON_CPU:
            return dist.ProcessGroupGloo(self._store, 0, size, limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(self._store, 0, size, options)

    def _send(self, push: Push, model: torch.nn.Module, version: str) -> str | None:
        """Sends everything to servers that have begun an update. Returns what went wrong on any rank.
        Collective."""
        buckets, dtype = plan_of(model)

        def receive(server: Server) -> None:
            for bucket in buckets:
                push.send(server, {
                    "names": bucket.names, "shapes": bucket.shapes,
                    "dtypes": [dtype_name(dtype)] * len(bucket.names),
                    "last": bucket is buckets[-1],
                })  # fmt: skip
            push.finish_update(server, version)
            push.resume(server, version)

        push.begin(receive)  # HTTP on other threads, the broadcast on this one
        problem = None
        if groups.data_rank() == 0 and groups.context_group().rank() == 0:
            problem = self._broadcast(push, model, buckets)
        if problem is not None:
            self._abandon()  # so that workers do not wait for the rest
            push.break_off()
        push.finish()
        return _first(problem or push.over, push.stop)

    def _broadcast(self, push: Push, model: torch.nn.Module, buckets: list[Bucket]) -> str | None:
        """Gathers on the ranks of one copy of the model; sends from the main one.

        After a problem, which is returned, nothing is sent, but gathering goes on: the others wait.
        """
        tensors, problem = hf_tensors.on_every_rank(model), None
        for bucket in buckets:
            buffer = torch.empty(bucket.bytes, dtype=torch.uint8, device=devices.device())
            fill(buffer, bucket, tensors)
            if groups.is_main() and problem is None:
                problem = self._send_one(push, buffer)
        devices.synchronize()
        return problem

    def _send_one(self, push: Push, buffer: torch.Tensor) -> str | None:
        """Broadcasts a bucket; ends early if a server fails meanwhile."""
        try:
            work = self._group.broadcast(buffer, 0)
            while not work.is_completed():
                push.look()
                if push.over is not None:
                    return push.over
                time.sleep(_POLL)
            work.wait()
        except RuntimeError as error:  # of gloo and NCCL
            return f"{type(error).__name__}: {error}"
        return None


def _first(problem: str | None, stop: Callable[[], bool]) -> str | None:
    """The first problem of any rank. Collective; waits for the ranks."""
    progress_wait.wait_for_all(idle=stop)
    found = groups.gather_objects(problem, dist.group.WORLD)
    return next((text for text in found if text is not None), None)
