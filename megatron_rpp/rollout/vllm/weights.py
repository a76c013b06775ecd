"""Pushes the weights of the policy to vLLM servers: the interface, and transport shared.

Through a directory: all ranks write their part of the tensors as safetensors files of bounded size at the same time. The
rank that looks after a server then asks it to read them. Whether every tensor of the model is in the
files is checked here: vLLM does not notice if a part of a fused parameter is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_rpp.hf import safetensors_out
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.model import hf_tensors
from megatron_rpp.parallel import groups, progress_wait
from megatron_rpp.rollout.vllm.api import Failure, Refused, Server

FILE_BYTES = 2**29
"""A file is written when it has at least this many bytes; a rank holds no more, and one tensor."""

Problems = dict[int, str]
"""What went wrong with a server, by its number."""


class Transport(Protocol):
    """A way for weights to come from the ranks to the servers."""

    def push(
        self,
        model: torch.nn.Module,
        servers: Mapping[int, Server],
        version: str,
        *,
        idle: Callable[[], object],
    ) -> Problems:
        """Gives all servers the weights of `model`. Collective over the world.

        Args:
            servers: those that this rank looks after, by number in the run.
            idle: called while this rank waits for others.
        Returns:
            What went wrong with servers of this rank. They are half-updated and must not be used.
        """

    def rest(self, servers: Mapping[int, Server]) -> bool:
        """Called when no more requests come before the next update. Returns whether the servers need
        new weights even if the policy does not change. Collective."""


class SharedFiles:
    """Weights in files that ranks and servers see."""

    def __init__(self, folder: Path, seconds: float):
        """seconds: time limit of one push for one server."""
        self._folder, self._seconds = folder, seconds

    def push(
        self,
        model: torch.nn.Module,
        servers: Mapping[int, Server],
        version: str,
        *,
        idle: Callable[[], object],
    ) -> Problems:
        """See Transport."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            files = self.write(model, idle)
            return update_all(servers, version, lambda server: self._send(server, files),
                              seconds=self._seconds)  # fmt: skip
        finally:
            progress_wait.wait_for_all(idle=idle)
            if groups.is_main():
                shutil.rmtree(self._folder, ignore_errors=True)

    def rest(self, servers: Mapping[int, Server]) -> bool:
        """The servers keep their weights."""
        return False

    def _send(self, server: Server, files: list[str]) -> None:
        server.ask("/update_weights", {"update_info": {"paths": files}}, timeout=self._seconds)

    def write(self, model: torch.nn.Module, idle: Callable[[], object]) -> list[str]:
        """Writes the weights; returns the files of all ranks. Collective. Raises RunFailure on every rank if one cannot write."""
        written: dict[str, list[str]] = {}
        problem = None
        rank = dist.get_rank()
        try:
            for number, tensors in enumerate(_buckets(hf_tensors.shared_out(model))):
                path = self._folder / f"{rank:05d}-{number:05d}.safetensors"
                safetensors_out.write(path, tensors)
                written[str(path)] = list(tensors)
        except OSError as error:
            problem = f"the weights cannot be written to {self._folder}: {error}"
        progress_wait.wait_for_all(idle=idle)
        found = groups.gather_objects((written, problem), dist.group.WORLD)
        for _, text in found:
            if text is not None:
                raise RunFailure(text)
        names = [name for files, _ in found for held in files.values() for name in held]
        wanted = [name for row in hf_tensors.all_rows(model) for name in row.hf]
        assert sorted(names) == sorted(wanted), set(names) ^ set(wanted)
        return [path for files, _ in found for path in files]


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


def update_all(
    servers: Mapping[int, Server],
    version: str,
    send: Callable[[Server], None],
    *,
    seconds: float,
) -> Problems:
    """Updates servers at the same time; `send` makes the calls of /update_weights of one server."""

    def update(server: Server) -> None:
        server.begin_update(seconds)
        send(server)
        server.finish_update(version, seconds)
        server.resume(version, seconds)

    return ask_all(servers, update)


def ask_all(servers: Mapping[int, Server], task: Callable[[Server], object]) -> Problems:
    """Runs `task` for all servers at the same time; returns what went wrong."""

    def run(server: Server) -> str | None:
        try:
            task(server)
        except (Failure, Refused) as error:
            return f"{server.name} did not take new weights: {error}"
        return None

    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        found = dict(zip(servers, pool.map(run, servers.values()), strict=True))
    return {number: problem for number, problem in found.items() if problem is not None}
