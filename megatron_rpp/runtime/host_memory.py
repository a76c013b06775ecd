"""Estimates how many bytes a rank that computes on a GPU keeps in the host's memory."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rpp.config import Config
from megatron_rpp.runtime.memory_estimate import (
    fullest_stages,
    has_reference,
    optimizer_shards,
    reward_models,
    trained_models,
)
from megatron_rpp.runtime.model_size import (
    FP32,
    optimizer_bytes,
    saved_bytes,
    stage_parameters,
    weight_bytes,
)


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one rank in the host's memory, besides the process itself, if it computes on a GPU."""

    reference: int
    """Weights of an offloaded reference model, pinned."""
    reward: int
    """Weights of offloaded reward models, pinned."""
    optimizer: int
    """Of an offloaded optimizer: Adam's state, fp32 weights, and pinned gradients in fp32."""
    save: int
    """Copies of what the rank writes: its share of the weights, and its part of Adam's state. State
    that is on the host is copied only if training goes on meanwhile."""

    def __add__(self, other: HostMemory) -> HostMemory:
        return HostMemory(
            reference=self.reference + other.reference,
            reward=self.reward + other.reward,
            optimizer=self.optimizer + other.optimizer,
            save=self.save + other.save,
        )

    @property
    def total(self) -> int:
        return self.reference + self.reward + self.optimizer + self.save


def host_estimate(config: Config, vocab_size: int, replicas: int) -> HostMemory:
    """Host bytes of the rank that needs the most."""
    stages = fullest_stages(config.parallel)
    found = (_stage_on_host(config, vocab_size, replicas=replicas, stage=s) for s in stages)
    return max(found, key=lambda memory: memory.total)


def _stage_on_host(config: Config, vocab_size: int, *, replicas: int, stage: int) -> HostMemory:
    model, parallel = config.model, config.parallel
    offloaded = has_reference(config) and config.reference.placement == "offload"
    waiting = config.reward.model_placement == "offload"
    weights = [used.weights for used in reward_models(config, stage=stage)] if waiting else []
    total = HostMemory(reference=0, reward=sum(weights), optimizer=0, save=0)
    for scalar, optimizer in trained_models(config):
        count = stage_parameters(model, parallel, vocab_size=vocab_size, stage=stage, scalar=scalar)
        # Besides the weights themselves.
        state = saved_bytes(model, optimizer.distributed) - weight_bytes(model)
        share = count * weight_bytes(model) // (replicas * parallel.context)
        owned = count // optimizer_shards(optimizer, parallel, replicas)
        copied = not optimizer.offload or config.checkpoint.async_save
        total += HostMemory(
            reference=count * weight_bytes(model) if offloaded and not scalar else 0,
            reward=0,
            optimizer=owned * (optimizer_bytes(model) + FP32) if optimizer.offload else 0,
            save=share + owned * state * copied,
        )
    return total
