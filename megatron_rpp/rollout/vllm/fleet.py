"""All servers of a run: which rank starts which, what state they are in, and who may use which.

The ranks of a host share its servers, which answer on the loopback interface alone. Server i of a
host is a child of the host's i-th rank. All methods that say so are collective over the world.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_rpp.config import Config
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups, progress_wait
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
        self.known: dict[int, Server] = {
            number: Server(urlsplit(url).netloc) for number, url in enumerate(vllm.urls)
        }
        """Servers that this rank may ask, by number in the run."""
        leaders = here.leaders
        rank = dist.get_rank()
        self.first = leaders.index(rank) % len(on_host or self.known) if rank in leaders else 0
        """Where this rank begins to count the servers, so that the ranks of a host share them."""
        self.shares_gpu = here.ranks.index(rank) < len(on_host) * vllm.tensor
        """With transport ipc: whether a worker of a server runs on the GPU of this rank."""
        self.count = len(self._places) or len(self.known)
        """Servers of the run."""
        self._own = [n for n, place in enumerate(self._places) if place.owner == dist.get_rank()]

    @property
    def cared_for(self) -> dict[int, Server]:
        """The servers that get their weights from this rank."""
        if self._places:
            return {number: child.server for number, child in self._children.items()}
        return self.known if groups.is_main() else {}

    def ensure_running(self, stop: Callable[[], bool]) -> bool:
        """Starts the servers that do not run; returns once all answer. Collective.

        Returns whether any was started: it has no weights yet.

        Raises:
            RunFailure: on every rank, if one does not start.
            Abandoned: on every rank, if `stop` was true.
        """
        missing = [n for n in self._own if n not in self._children or not self._children[n].alive]
        if not groups.on_any(bool(missing)):
            return False
        heartbeat.enter("starting vLLM")
        for number in missing:
            self._children[number] = self._start(number)
        abandoned, problem = False, None
        try:
            for number in missing:
                self._await(self._children[number], stop)
        except Abandoned:
            abandoned = True
        except RunFailure as error:
            problem = str(error)
        progress_wait.wait_for_all(idle=stop)
        own = {number: child.server.address for number, child in self._children.items()}
        found = groups.gather_objects((abandoned, problem, own), dist.group.WORLD)
        raise_first(problem for _, problem, _ in found)
        if any(abandoned for abandoned, _, _ in found):
            raise Abandoned
        self._learn({n: address for _, _, own in found for n, address in own.items()})
        return True

    def _learn(self, addresses: dict[int, str]) -> None:
        self.known = {
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

    def _await(self, child: Child, stop: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._config.rollout.vllm.start_timeout
        while not child.server.is_healthy():
            heartbeat.current.beat()  # the deadline ends it, not the watchdog
            if stop():
                raise Abandoned
            if not child.alive:
                raise RunFailure(f"{child.server.name} ended while it started; {child.tail()}")
            if time.monotonic() > deadline:
                limit = self._config.rollout.vllm.start_timeout
                raise RunFailure(
                    f"{child.server.name} does not answer after {limit:.0f} s "
                    f"(rollout.vllm.start_timeout); {child.tail()}"
                )
            time.sleep(_POLL)

    def give_up(self, lost: dict[int, str]) -> dict[int, str]:
        """Ends the servers of this rank among `lost`; returns why, with the ends of their logs."""
        reasons = {}
        for number, reason in lost.items():
            child = self._children.pop(number, None)
            if child is not None:
                child.end()
                reasons[number] = f"{child.server.name} is lost: {reason}; {child.tail()}"
            elif not self._places and groups.is_main():
                reasons[number] = f"{self.known[number].name} is lost: {reason}"
        return reasons


def raise_first(problems: Iterable[str | None]) -> None:
    """Raises RunFailure with the first of `problems` that is not None."""
    for problem in problems:
        if problem is not None:
            raise RunFailure(problem)
