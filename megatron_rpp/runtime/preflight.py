"""Preflight: checks, before a run starts, that the cluster meets the needs of the run.

`run` prints a table of checks and raises ConfigError (exit code 2) if one has failed.
tools/preflight.py calls it, and so does `train --dry-run` before it builds the models. Collective:
every rank takes part in every check, and rank 0 decides.

Left out: the file system's speed, single links (the all-reduce measures the slowest), GPU health.
"""

from __future__ import annotations

import platform
import shutil
import socket
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rpp.config import Config, ParallelConfig, check_world_size
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import gpu_facts, groups
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime.engine_check import check_engine
from megatron_rpp.runtime.host_memory import host_estimate
from megatron_rpp.runtime.memory_estimate import CPU, GPU, checkpoint_bytes, estimate
from megatron_rpp.runtime.model_size import stage_parameters, weight_bytes
from megatron_rpp.runtime.preflight_gpu import (
    Check,
    judge_gpu,
    judge_host_memory,
    judge_node,
    merge,
)
from megatron_rpp.runtime.shared_directory import blind_hosts

BANDWIDTH_BYTES = 2**24
BANDWIDTH_ROUNDS = 5
PROCESS_BYTES = 600_000_000
"""Python and torch, in the host's memory, for each rank that computes there."""


def run(config: Config, vocab_size: int, console: Console) -> None:
    """Runs all checks and prints their table on rank 0. Collective; needs the process groups.

    Raises ConfigError, on every rank, if a check has failed.
    """
    checks = [
        _versions(),
        _devices(),
        *_gpus(config),
        _layout(config),
        _memory(config, vocab_size),
        *_host_memory(config, vocab_size),
        _disk(config, vocab_size),
        _shared(Path(config.checkpoint.dir)),
        _shared(Path(config.logging.dir)),
        _bandwidth(),
        *_engine(config, vocab_size),
    ]
    rows = [["ok" if c.passed else "FAILED", c.name, c.found] for c in checks]
    console.table("preflight", ["", "check", "found"], rows)
    failed = groups.broadcast_object([check for check in checks if not check.passed])
    if failed:
        found = "; ".join(f"{check.name}: {check.found}" for check in failed)
        raise ConfigError(f"preflight: {len(failed)} of {len(checks)} checks failed: {found}")
    console.log(f"preflight: all {len(checks)} checks passed")


def _gather(value: Any) -> list[Any]:
    return groups.gather_objects(value, dist.group.WORLD)


def _replicas(config: Config) -> int:
    return check_world_size(config, dist.get_world_size())


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _versions() -> Check:
    """Checks that every rank has the same software."""
    own = (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"megatron-core {version('megatron-core')}"
    )
    found = sorted(set(_gather(own)))
    if len(found) == 1:
        return Check("versions", True, own)
    return Check("versions", False, f"ranks differ ({' | '.join(found)}): use one environment")


def _devices() -> Check:
    """Checks that all ranks run on devices of one kind."""
    hosts = _gather((socket.gethostname(), devices.describe().split(";")[0]))
    kinds = sorted({kind for _, kind in hosts})
    count = len({host for host, _ in hosts})
    text = f"{len(hosts)} rank(s) on {count} host(s): {' | '.join(kinds)}"
    if len(kinds) > 1:
        return Check("devices", False, f"{text}: the slowest sets the pace, use equal nodes")
    return Check("devices", True, text)


def _gpus(config: Config) -> list[Check]:
    """The driver of every node and, on GPUs, the software and the links of every rank."""
    host = socket.gethostname()
    hosts = _gather(host)
    gpu = gpu_facts.gpu_facts(tries_compiler=hosts.index(host) == dist.get_rank())
    checks = [judge_node(gpu_facts.node_facts(), on_gpu=gpu is not None)]
    if gpu is not None:
        checks += judge_gpu(
            gpu,
            dtype=config.model.dtype,
            transformer_impl=config.model.transformer_impl,
            several_nodes=len(set(hosts)) > 1,
        )
    return merge(_gather((host, checks)))


def _layout(config: Config) -> Check:
    """Shows the layout. A tensor-parallel group communicates in every layer: it belongs on one node."""
    parallel = config.parallel
    text = (
        f"tensor {parallel.tensor} × pipeline {parallel.pipeline} × context {parallel.context} × "
        f"data {_replicas(config)}, {config.model.layers // parallel.pipeline} layers a stage"
    )
    hosts = groups.gather_objects(socket.gethostname(), groups.tensor_group())
    if any(_gather(len(set(hosts)) > 1)):
        text += "; a tensor-parallel group spans nodes, which is slow"
    return Check("layout", True, text)  # config/validation.py has checked the divisibility


def _memory(config: Config, vocab_size: int) -> Check:
    """Compares the estimate for a rank with the memory that is free for it."""
    kind = CPU if devices.ON_CPU else GPU
    need = estimate(config, vocab_size, _replicas(config), device=kind)
    free, each = devices.free_memory(), need.total
    if devices.ON_CPU:
        # The ranks of a host share it.
        free //= _gather(socket.gethostname()).count(socket.gethostname())
        each += PROCESS_BYTES
    elif config.rollout.engine == "vllm" and config.rollout.vllm.transport == "ipc":
        # A server wakes up on the GPU of this rank once the update's memory is free.
        server = int(config.rollout.vllm.memory_share * devices.total_memory())
        each = max(each, each - need.update + server)
    least = min(_gather(free))
    parts = ", ".join(f"{name} {_size(size)}" for name, size in asdict(need).items() if size)
    text = f"{_size(each)} a rank of {_size(least)} free ({parts})"
    if each > least:
        text += (
            ": raise parallel.*, lower train.max_tokens_per_microbatch or rollout.max_batch, or set "
            "train.recompute; tools/plan.py shows what fits"
        )
    return Check("memory", each <= least, text)


def check_host_memory(config: Config, vocab_size: int) -> None:
    """Checks that what is offloaded fits into the memory of every host, before it is allocated.

    Collective. Raises ConfigError, on every rank.
    """
    offloaded = config.optimizer.offload or config.critic.optimizer.offload
    placements = (config.reference.placement, config.reward.model_placement)
    if not offloaded and "offload" not in placements:
        return
    for check in _host_memory(config, vocab_size):
        if not check.passed:
            raise ConfigError(f"host memory: {check.found}")


def _host_memory(config: Config, vocab_size: int) -> list[Check]:
    """Of ranks that compute on GPUs; on a CPU, _memory has counted everything."""
    if devices.ON_CPU:
        return []
    need = host_estimate(config, vocab_size, _replicas(config))
    return [judge_host_memory(need, _gather((socket.gethostname(), devices.free_host_memory())))]


def _disk(config: Config, vocab_size: int) -> Check:
    """Checks the room for the checkpoints that stay, including the best, and the one being written."""
    size = checkpoint_bytes(config, vocab_size)
    staying = config.checkpoint.keep + config.checkpoint.keep_best
    need = size * (staying + 1)
    free = groups.broadcast_object(shutil.disk_usage(config.checkpoint.dir).free)
    text = (
        f"{staying} + 1 checkpoints of {_size(size)} in "
        f"{_size(free)} free at {config.checkpoint.dir}"
    )
    if need > free:
        text += ": free some, lower checkpoint.keep or choose another checkpoint.dir"
    return Check("disk", need <= free, text)


def _shared(directory: Path) -> Check:
    """Checks that every rank sees rank 0's file, and that rank 0 sees every rank's file."""
    try:
        blind = blind_hosts(directory)
    except ConfigError as error:
        return Check("shared directory", False, str(error))
    text = f"{directory} is written and seen by all ranks"
    if blind:
        text = (
            f"{directory} is not one directory on all nodes: {', '.join(blind)}; use a shared one"
        )
    return Check("shared directory", not blind, text)


def _engine(config: Config, vocab_size: int) -> list[Check]:
    """The servers of rollout.engine vllm, and the directory of their weights."""
    if config.rollout.engine != "vllm":
        return []
    try:
        found = check_engine(config, vocab_size, thorough=True)
    except ConfigError as error:
        return [Check("rollout engine", False, str(error))]
    checks = [Check("rollout engine", True, str(found))]
    if config.rollout.vllm.transport == "shared":
        checks.append(_weights_room(config, vocab_size))
    return checks


def _weights_room(config: Config, vocab_size: int) -> Check:
    """The room for one copy of the weights in rollout.vllm.dir."""
    vllm = config.rollout.vllm
    alone = stage_parameters(config.model, ParallelConfig(), vocab_size=vocab_size, stage=0)
    need = alone * weight_bytes(config.model)
    free = groups.broadcast_object(shutil.disk_usage(vllm.dir).free)
    text = f"weights of {_size(need)} in {_size(free)} free at rollout.vllm.dir {vllm.dir}"
    return Check("room for weights", need <= free, text)


def _bandwidth() -> Check:
    """Measures the bus bandwidth of an all-reduce: 2 (n-1)/n bytes per byte cross each rank's link."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return Check("network", True, "one rank: none needed")
    data = torch.zeros(BANDWIDTH_BYTES // 4, device=devices.device())
    dist.all_reduce(data)  # opens the connections
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(BANDWIDTH_ROUNDS):
        dist.all_reduce(data)
    torch.cuda.synchronize()
    seconds = max(_gather(time.perf_counter() - start)) / BANDWIDTH_ROUNDS
    speed = 2 * (ranks - 1) / ranks * BANDWIDTH_BYTES / seconds
    size = _size(BANDWIDTH_BYTES)
    return Check("network", True, f"all-reduce of {size} over {ranks} ranks: {_size(speed)}/s")
