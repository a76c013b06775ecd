"""Pushes the weights of the policy to vLLM servers: the interface, and transport shared.

Through a directory: all ranks write their part of the tensors as safetensors files of bounded size at
the same time. The rank that looks after a server then asks it to read them. Whether every tensor of the model is in the
files is checked here: vLLM does not notice if a part of a fused parameter is missing.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import psutil
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from megatron_rpp.hf import safetensors_out
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.model import hf_tensors
from megatron_rpp.parallel import groups, progress_wait
from megatron_rpp.rollout.vllm.api import Server
from megatron_rpp.rollout.vllm.pushing import Problems, Push

FILE_BYTES = 2**29
"""A file is written when it has at least this many bytes; a rank holds no more, and one tensor."""

_PREFIX = "megatron_rpp-"


def weights_folder(parent: Path, run: str) -> Path:
    """Where the main rank of a run has its weights written. Collective.

    Folders of runs whose main rank is gone from this host, such as after a kill, are removed.
    """
    found = None
    if groups.is_main():
        space = Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
        here = f"{_PREFIX}{socket.gethostname()}-{space}-"
        for left in parent.glob(f"{here}*-*"):
            pid = left.name.removeprefix(here).partition("-")[0]
            if pid.isdecimal() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(left, ignore_errors=True)
        found = parent / f"{here}{os.getpid()}-{run}"
    return groups.broadcast_object(found)


class Transport(Protocol):
    """A way for weights to come from the ranks to the servers."""

    keeps_weights: bool
    """Whether servers have their weights still after `rest`."""

    def push(
        self,
        model: torch.nn.Module,
        servers: Mapping[int, Server],
        version: str,
        *,
        stop: Callable[[], bool],
    ) -> Problems:
        """Gives all servers the weights of `model`. Collective over the world.

        Args:
            servers: those that this rank looks after, by number in the run.
            stop: asked while this rank waits; once it is true, requests are broken off.
        Returns:
            What went wrong with servers of this rank. They are half-updated and must not be used.
        Raises:
            RunFailure: on every rank, if the weights cannot be written.
        """

    def rest(self, servers: Mapping[int, Server], *, stop: Callable[[], bool]) -> Problems:
        """Called when no more requests come before the next update. Collective.

        Returns what went wrong with servers of this rank, which must not be used any more.
        """


class SharedFiles:
    """Weights in files that ranks and servers see."""

    keeps_weights = True

    def __init__(self, folder: Path, seconds: float):
        """seconds: time limit of the servers' part of one push."""
        self._folder, self._seconds = folder, seconds

    def push(
        self,
        model: torch.nn.Module,
        servers: Mapping[int, Server],
        version: str,
        *,
        stop: Callable[[], bool],
    ) -> Problems:
        """See Transport."""
        try:
            files = self.write(model, stop)
            push = Push(servers, seconds=self._seconds, stop=stop)
            push.on_all(lambda server: _update(push, server, files, version=version))
            return push.problems
        finally:
            progress_wait.wait_for_all(idle=stop)
            if groups.is_main():
                shutil.rmtree(self._folder, ignore_errors=True)

    def rest(self, servers: Mapping[int, Server], *, stop: Callable[[], bool]) -> Problems:
        """The servers keep their weights."""
        return {}

    def write(self, model: torch.nn.Module, idle: Callable[[], object]) -> list[str]:
        """Writes the weights; returns the files of all ranks. Collective.

        Raises RunFailure on every rank if one of them cannot write.
        """
        own = self._write_own(model)
        progress_wait.wait_for_all(idle=idle)
        found = groups.gather_objects(own, dist.group.WORLD)
        for _, problem in found:
            if problem is not None:
                raise RunFailure(problem)
        names = [name for files, _ in found for held in files.values() for name in held]
        wanted = [name for row in hf_tensors.all_rows(model) for name in row.hf]
        assert sorted(names) == sorted(wanted), set(names) ^ set(wanted)
        return [path for files, _ in found for path in files]

    def _write_own(self, model: torch.nn.Module) -> tuple[dict[str, list[str]], str | None]:
        """The files of this rank with the names in them, and what went wrong.

        A rank that cannot write takes part in gathering to the end: the others wait for it.
        """
        written: dict[str, list[str]] = {}
        problem = None
        for number, tensors in enumerate(_buckets(hf_tensors.shared_out(model))):
            if problem is not None:
                continue
            path = self._folder / f"{dist.get_rank():05d}-{number:05d}.safetensors"
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                safetensors_out.write(path, tensors)
            except (OSError, SafetensorError) as error:
                problem = (
                    f"the weights cannot be written to {self._folder} ({error}): make room in "
                    "rollout.vllm.dir, or choose another directory"
                )
            written[str(path)] = list(tensors)
        return written, problem


def _update(push: Push, server: Server, files: list[str], *, version: str) -> None:
    push.start_update(server)
    push.send(server, {"paths": files})
    push.finish_update(server, version)
    push.resume(server, version)


def _buckets(tensors: Iterator[hf_tensors.Tensors]) -> Iterator[dict[str, torch.Tensor]]:
    """Collects tensors, on the host, into dictionaries of at least FILE_BYTES."""
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    for part in tensors:
        heartbeat.current.beat()
        for name, tensor in part:
            bucket[name] = tensor.cpu()
            size += tensor.nbytes
        if size >= FILE_BYTES:
            yield bucket
            bucket, size = {}, 0
    if bucket:
        yield bucket
