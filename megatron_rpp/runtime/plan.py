"""Plans a run: which layouts of so many GPUs fit, and how fast each would be.

Pure functions of the settings; memory_estimate.py and step_time.py have the arithmetic. Left out:
expert parallelism, stages of different sizes, other micro-batches or rollout batches than given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_rpp.config import Config, ParallelConfig, check_world_size
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.runtime.assumptions import Assumptions
from megatron_rpp.runtime.host_memory import HostMemory, host_estimate
from megatron_rpp.runtime.machines import Machine
from megatron_rpp.runtime.memory_estimate import Memory, estimate, reward_models
from megatron_rpp.runtime.model_size import (
    FP32,
    layer_parameters,
    optimizer_bytes,
    stage_parameters,
    weight_bytes,
)
from megatron_rpp.runtime.step_time import StepTime, step_time

USABLE = 0.9
"""Share of a GPU's memory that a plan may use; the rest is for the allocator's fragmentation."""
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
TENSOR, CONTEXT = (1, 2, 4, 8), (1, 2, 4, 8)
"""Sizes to try; a tensor-parallel group stays within a node."""


@dataclass(frozen=True)
class Plan:
    """One layout of a run."""

    config: Config
    """The run's settings with this layout."""
    gpus: int
    replicas: int
    memory: Memory
    host: HostMemory
    time: StepTime

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of one step."""
        return self.gpus * self.time.total / 3600


def _sizes(config: Config, gpus: int, per_node: int) -> Iterator[ParallelConfig]:
    layers = config.model.layers
    stages = [size for size in range(1, layers + 1) if layers % size == 0]
    for tensor, pipeline, context in itertools.product(TENSOR, stages, CONTEXT):
        if tensor > per_node or gpus % (tensor * pipeline * context):
            continue
        for virtual in (1, 2) if pipeline > 1 else (1,):
            yield replace(
                config.parallel, tensor=tensor, pipeline=pipeline, context=context,
                virtual_pipeline=virtual, sequence_parallel=tensor > 1,
            )  # fmt: skip


def candidates(config: Config, gpus: int, machine: Machine) -> Iterator[tuple[Config, int]]:
    """(settings, data-parallel size) of every layout that the checks of a run accept."""
    reward_models(replace(config, parallel=ParallelConfig()), stage=0)  # are they there at all
    trains = [replace(config.train, recompute=recompute) for recompute in RECOMPUTE]
    for parallel in _sizes(config, gpus, machine.per_node):
        for train in trains:
            try:
                layout = replace(config, parallel=parallel, train=train)
                replicas = check_world_size(layout, gpus)
                reward_models(layout, stage=0)
                yield layout, replicas
            except ConfigError:
                continue


def plans(
    config: Config, vocab_size: int, *, gpus: int, machine: Machine, assumed: Assumptions
) -> list[Plan]:
    """Layouts of exactly `gpus` GPUs that fit, the fastest first.

    Raises ConfigError if no layout divides the GPUs, or none fits.
    """
    found, least = [], None
    for layout, replicas in candidates(config, gpus, machine):
        memory = estimate(layout, vocab_size, replicas)
        if least is None or memory.total < least.total:
            least = memory
        if memory.total <= USABLE * machine.memory:
            time = step_time(
                layout, vocab_size, replicas=replicas, machine=machine, assumed=assumed
            )
            host = host_estimate(layout, vocab_size, replicas)
            found.append(Plan(layout, gpus, replicas, memory, host, time))
    if not found:
        raise ConfigError(_why_none(config, gpus, machine=machine, least=least))
    return sorted(found, key=lambda plan: (plan.time.total, plan.memory.total))


def _why_none(config: Config, gpus: int, *, machine: Machine, least: Memory | None) -> str:
    if least is None:
        return (
            f"no layout divides {gpus} GPUs, the model's heads ({config.model.heads}) and layers "
            f"({config.model.layers}), and rollout.prompts_per_step = "
            f"{config.rollout.prompts_per_step}: change the number of GPUs or of prompts"
        )
    return (
        f"no layout on {gpus} GPUs fits: the leanest needs {least.total / 1e9:.0f} GB on each, and "
        f"{USABLE:.0%} of its memory is {USABLE * machine.memory / 1e9:.0f} GB: take more GPUs, or "
        "lower rollout.max_batch and train.max_tokens_per_microbatch, or set reference.placement "
        "to offload"
    )


def best_plans(
    config: Config, vocab_size: int, *, gpus: int, machine: Machine, assumed: Assumptions
) -> list[Plan]:
    """`plans` of `gpus` GPUs, or of a half, a quarter ... of them if those are faster.

    Past some number, communication costs more than further GPUs save. The result is never slower
    than that of half as many GPUs.

    Raises ConfigError if none of these fits.
    """
    if config.rollout.engine != "megatron":
        raise ConfigError(
            f"rollout.engine {config.rollout.engine} is not planned for: add --rollout.engine "
            "megatron. With vLLM on other GPUs, the memory of an update stays the same; with transport "
            "ipc, train --dry-run on the GPUs checks that the server's share fits"
        )
    found: list[list[Plan]] = []
    problem = None
    while gpus >= 1:
        try:
            found.append(plans(config, vocab_size, gpus=gpus, machine=machine, assumed=assumed))
        except ConfigError as error:
            problem = problem or error
        if gpus % 2:
            break
        gpus //= 2
    if not found:
        assert problem is not None
        raise problem
    return min(found, key=lambda some: some[0].time.total)


@dataclass(frozen=True)
class Limits:
    """What no layout on such machines can beat."""

    state_bytes: int
    """Weights, gradients and, unless it is offloaded, Adam's state of the whole model."""
    state_gpus: int
    """GPUs whose memory just holds them."""
    read_seconds: float
    """For a decoded token: the GPUs of the widest tensor-parallel group read all weights."""
    launch_seconds: float
    """For a decoded token: the host launches every layer, whatever the layout."""
    rollout_seconds: float
    """The longest response, token after token."""


def limits(config: Config, vocab_size: int, *, machine: Machine, assumed: Assumptions) -> Limits:
    """See Limits."""
    model = config.model
    count = stage_parameters(model, ParallelConfig(), vocab_size=vocab_size, stage=0)
    adam = 0 if config.optimizer.offload else optimizer_bytes(model)
    state = count * (weight_bytes(model) + FP32 + adam)
    shared = math.gcd(model.heads, model.kv_heads or model.heads, model.ffn_hidden)
    widest = max(size for size in TENSOR if size <= machine.per_node and shared % size == 0)
    read = model.layers * layer_parameters(model, widest) * weight_bytes(model) / machine.bandwidth
    launch = model.layers * assumed.host_ms_per_layer / 1e3
    return Limits(
        state_bytes=state,
        state_gpus=math.ceil(state / machine.memory),
        read_seconds=read,
        launch_seconds=launch,
        rollout_seconds=max(read, launch) * config.rollout.max_new_tokens,
    )
