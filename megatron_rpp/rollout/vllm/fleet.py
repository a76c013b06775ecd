"""All servers of a run: which rank starts which, what state they are in, and who may use which.

The ranks of a host share its servers, which answer on a socket of that host alone. Server i of a
host is a child of the host's i-th rank. All methods that say so are collective over the world.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_rpp.config import Config
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import gpu_sharing, groups, progress_wait
from megatron_rpp.parallel.ranks import raise_on_all_ranks
from megatron_rpp.rollout.engine import Abandoned
from megatron_rpp.rollout.vllm.api import Server
from megatron_rpp.rollout.vllm.servers import Child, Site

_POLL = 0.3
"""Seconds between two questions whether a server is ready."""


@dataclass(frozen=True)
class Place:
    """Where a server runs."""

    host: str
    on_host: int
    """Its number on the host."""
    owner: int
    """The rank that looks after it."""


@dataclass(frozen=True)
class Host:
    """The ranks of one host, and those of them that lead a replica."""

    name: str
    ranks: list[int]
    leaders: list[int]


def hosts() -> list[Host]:
    """The hosts of the world, in the order of their first ranks. Collective."""
    found: dict[str, Host] = {}
    own = (socket.gethostname(), groups.is_replica_leader())
    for rank, (name, leads) in enumerate(groups.gather_objects(own, dist.group.WORLD)):
        host = found.setdefault(name, Host(name, [], []))
        host.ranks.append(rank)
        if leads:
            host.leaders.append(rank)
    return list(found.values())


def places(hosts: list[Host], replicas: int | None) -> list[Place]:
    """The places of all servers. replicas: rollout.vllm.replicas.

    Raises ConfigError if they cannot be spread evenly.
    """
    used = [host for host in hosts if host.leaders]
    if replicas is not None and replicas % len(used):
        raise ConfigError(
            f"rollout.vllm.replicas must be divisible by the {len(used)} nodes that sample, got "
            f"{replicas}: each needs as many servers"
        )
    return [
        Place(host.name, number, host.ranks[number % len(host.ranks)])
        for host in used
        for number in range(replicas // len(used) if replicas else len(host.leaders))
    ]


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def gpus_of(
    visible: list[str], ranks: int, on_host: int, *, tensor: int, transport: str
) -> list[str]:
    """The GPUs of server `on_host` of a host with so many ranks, one GPU for each.

    With transport ipc they are those of the ranks, else those after them. Raises ConfigError if there
    are not enough.
    """
    first, end = (0, ranks) if transport == "ipc" else (ranks, len(visible))
    chosen = visible[first:end][on_host * tensor : (on_host + 1) * tensor]
    if len(chosen) < tensor:
        whose = f"the {ranks} GPUs of its ranks" if transport == "ipc" else (
            f"the {len(visible) - ranks} GPUs that its {ranks} ranks leave"
        )  # fmt: skip
        raise ConfigError(
            f"rollout.vllm: server {on_host + 1} of tensor size {tensor} on a node does not find "
            f"its GPUs among {whose} (transport {transport}): change rollout.vllm.replicas or "
            "rollout.vllm.tensor, or start fewer ranks per node"
        )
    return chosen


def check_placement(config: Config) -> None:
    """Raises ConfigError, on every rank, if servers do not find their GPUs. Collective."""
    everywhere, vllm = hosts(), config.rollout.vllm
    here = _here(everywhere)

    def check() -> None:
        for place in places(everywhere, vllm.replicas):
            if place.host == here.name and not devices.ON_CPU:
                gpus_of(
                    visible_gpus(), len(here.ranks), place.on_host, tensor=vllm.tensor,
                    transport=vllm.transport,
                )  # fmt: skip

    raise_on_all_ranks(check)


def _here(everywhere: list[Host]) -> Host:
    return next(host for host in everywhere if dist.get_rank() in host.ranks)


@dataclass(frozen=True)
class Started:
    """What `Fleet.ensure_running` did."""

    fresh: bool = False
    """Whether servers have been started: they have no weights yet."""
    problems: dict[int, str] = field(default_factory=dict)
    """Servers of this rank that did not start, and why."""


class Fleet:
    """The servers, seen from one rank."""

    def __init__(self, config: Config, *, model: Path, weights: Path):
        """Starts nothing. Collective.

        Args:
            model: directory with config.json.
            weights: directory of the weights with transport shared.
        """
        self._config, self._children = config, dict[int, Child]()
        everywhere, vllm = hosts(), config.rollout.vllm
        self._here = here = _here(everywhere)
        self._places = [] if vllm.urls else places(everywhere, vllm.replicas)
        on_host = [place for place in self._places if place.host == here.name]
        self._site = Site(
            config=config, model=model, weights=weights, on_cpu=devices.ON_CPU,
            servers=len(on_host),
        )  # fmt: skip
        self._known: dict[int, Server] = {
            number: Server(urlsplit(url).netloc) for number, url in enumerate(vllm.urls)
        }
        self._left_out: set[int] = set()
        leaders = here.leaders if self._places else [r for host in everywhere for r in host.leaders]
        rank = dist.get_rank()
        self.leaders = len(leaders)
        """How many ranks send requests to the servers of this rank."""
        self.leader = leaders.index(rank) if rank in leaders else 0
        """The number of this rank among them, so that they share the servers evenly."""
        self.shares_gpu = here.ranks.index(rank) < len(on_host) * vllm.tensor
        """With transport ipc: whether a worker of a server runs on the GPU of this rank."""
        self.count = len(self._places) or len(self._known)
        """Servers of the run."""
        self.starts = bool(self._places)
        """Whether the run starts its servers."""
        self._own = [n for n, place in enumerate(self._places) if place.owner == dist.get_rank()]

    @property
    def usable(self) -> dict[int, Server]:
        """Servers that this rank may ask, by number in the run."""
        return {n: server for n, server in self._known.items() if n not in self._left_out}

    @property
    def cared_for(self) -> dict[int, Server]:
        """The servers that get their weights from this rank."""
        if self._places:
            return {number: child.server for number, child in self._children.items()}
        return self._known if groups.is_main() else {}

    def ensure_running(self, stop: Callable[[], bool]) -> Started:
        """Starts the servers that do not run; returns once they answer or have failed. Collective.

        Raises Abandoned, on every rank, if `stop` was true.
        """
        missing = [n for n in self._own if n not in self._children or not self._children[n].alive]
        if not groups.on_any(bool(missing)):
            return Started()
        heartbeat.enter("starting vLLM")
        if self._config.rollout.vllm.transport == "ipc":  # it takes its memory on the ranks' GPUs
            gpu_sharing.free_cached_memory()
            progress_wait.wait_for_all(idle=stop)
        for number in missing:
            self._children[number] = self._start(number)
        abandoned, problems = False, dict[int, str]()
        try:
            for number in missing:
                if (problem := self._await(self._children[number], stop)) is not None:
                    problems[number] = problem
        except Abandoned:
            abandoned = True
        progress_wait.wait_for_all(idle=stop)
        own = {number: child.server.address for number, child in self._children.items()}
        found = groups.gather_objects((abandoned, own), dist.group.WORLD)
        if any(abandoned for abandoned, _ in found):
            raise Abandoned
        self._learn({n: address for _, own in found for n, address in own.items()})
        return Started(True, problems)

    def _learn(self, addresses: dict[int, str]) -> None:
        self._known = {
            number: Server(address, self._name(number))
            for number, address in sorted(addresses.items())
            if self._places[number].host == self._here.name
        }

    def _name(self, number: int) -> str:
        return f"vLLM server {number} on {self._places[number].host}"

    def _start(self, number: int) -> Child:
        place = self._places[number]
        log = Path(self._config.logging.dir) / "vllm" / f"server_{number:03d}.log"
        return Child(self._site, name=self._name(number), gpus=self._gpus(place.on_host), log=log)

    def _gpus(self, on_host: int) -> str | None:
        """The value of CUDA_VISIBLE_DEVICES of a server; None = as it is."""
        if devices.ON_CPU:
            return None
        vllm, ranks = self._config.rollout.vllm, len(self._here.ranks)
        return ",".join(
            gpus_of(visible_gpus(), ranks, on_host, tensor=vllm.tensor, transport=vllm.transport)
        )

    def _await(self, child: Child, stop: Callable[[], bool]) -> str | None:
        """Waits until a server answers; returns what went wrong. Raises Abandoned on a stop."""
        limit = self._config.rollout.vllm.start_timeout
        deadline = time.monotonic() + limit
        while not (child.server.is_healthy() and child.alive):
            heartbeat.current.beat()  # the deadline ends it, not the watchdog
            if stop():
                raise Abandoned
            if not child.alive:
                return "it ended while it started"
            if time.monotonic() > deadline:
                return f"it does not answer after {limit:.0f} s (rollout.vllm.start_timeout)"
            time.sleep(_POLL)
        return None

    def leave_out(self, problems: dict[int, str]) -> bool:
        """After a push to rollout.vllm.urls: leaves out servers that have not taken the weights.

        Returns whether the others can go on without them, which servers of the run never do.
        Collective. problems: those of the main rank count.
        """
        if self.starts:
            return False
        self._left_out = groups.broadcast_object(set(problems))
        return bool(self.usable)

    def give_up(self, lost: dict[int, str]) -> dict[int, str]:
        """Ends the servers of this rank among `lost`; returns why, with the ends of their logs."""
        reasons = {}
        for number, reason in lost.items():
            child = self._children.pop(number, None)
            if child is not None:
                child.end()
                reasons[number] = f"{child.server.name} is lost: {reason}; {child.tail()}"
            elif not self._places and groups.is_main():
                reasons[number] = f"{self._known[number].name} is lost: {reason}"
        return reasons


def raise_first(problems: Iterable[str | None]) -> None:
    """Raises RunFailure with the first of `problems` that is not None."""
    for problem in problems:
        if problem is not None:
            raise RunFailure(problem)
