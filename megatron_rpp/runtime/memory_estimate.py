"""Estimates how many bytes a rank will hold, from the settings, and those of the reward models'
directories; uses no device.

The estimate is for the pipeline stage that holds the most, at the peak of an update or of a rollout.
Left out: the allocator's fragmentation (5-10% of a GPU if rows vary in length), mixture of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_rpp.config import Config, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rpp.model import decode_sizes
from megatron_rpp.runtime import activation_memory as activation
from megatron_rpp.runtime.activation_memory import CPU, GPU, Device
from megatron_rpp.runtime.model_size import (
    FP32,
    heads_of,
    layer_matrices,
    optimizer_bytes,
    saved_bytes,
    stage_parameters,
    vocabulary_rows,
    weight_bytes,
)

__all__ = ["CPU", "GPU", "Memory", "checkpoint_bytes", "estimate"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    critic: int
    """Its weights, gradients and optimizer; 0 if there is none."""
    reward: int
    """Weights of the reward models that stay on the device."""
    scoring: int
    """A pass of the largest reward model, with its weights if they were in host memory."""
    activations: int
    """Of the micro-batches in flight, with the outputs that wait for their gradient."""
    backward: int
    """The largest step of the backward pass: a layer, or the output projection."""
    cache: int
    """Keys and values of the sequences that are decoded."""
    prefill: int
    """A pass over prompts in one layer, or the sampled distribution."""
    packed: int
    """Large weights again, in the order of a CPU's kernels."""
    overhead: int
    """CUDA context and NCCL's buffers."""

    @property
    def update(self) -> int:
        """What only the update needs."""
        return self.activations + self.backward

    @property
    def resident(self) -> int:
        """What is there all the time."""
        models = self.reference + self.critic + self.reward
        return self.weights + self.gradients + self.optimizer + models + self.overhead

    @property
    def rollout(self) -> int:
        """What only the rollout needs."""
        return self.cache + self.prefill + self.packed

    @property
    def total(self) -> int:
        """The peak. The cache is freed before the update, which needs the activations."""
        return self.resident + max(self.update, self.rollout, self.scoring)


def has_reference(config: Config) -> bool:
    """Whether there is a reference model."""
    return config.algorithm.kl_in_reward or config.algorithm.kl_loss_coef > 0


def optimizer_shards(optimizer: OptimizerConfig, parallel: ParallelConfig, replicas: int) -> int:
    """Over how many ranks Adam's state of one parameter is spread."""
    return replicas * parallel.context if optimizer.distributed else 1


def fullest_stages(parallel: ParallelConfig) -> set[int]:
    """The stages that may hold the most: those between hold no embedding and fewer micro-batches
    than the first."""
    return {0, parallel.pipeline - 1}


def estimate(config: Config, vocab_size: int, replicas: int, *, device: Device = GPU) -> Memory:
    """Bytes of the rank that holds the most. replicas: the data-parallel size."""
    stages = stage_estimates(config, vocab_size, replicas=replicas, device=device)
    return max(stages, key=lambda memory: memory.total)


def stage_estimates(
    config: Config, vocab_size: int, *, replicas: int, device: Device = GPU
) -> list[Memory]:
    """Bytes of a rank of each stage that may hold the most."""
    return [
        stage_estimate(config, vocab_size, replicas=replicas, stage=stage, device=device)
        for stage in sorted(fullest_stages(config.parallel))
    ]


def stage_estimate(
    config: Config, vocab_size: int, *, replicas: int, stage: int, device: Device = GPU
) -> Memory:
    """Bytes of a rank of pipeline stage `stage`."""
    model, parallel = config.model, config.parallel
    count = stage_parameters(model, parallel, vocab_size=vocab_size, stage=stage)
    weights = count * weight_bytes(model)
    resident = has_reference(config) and config.reference.placement == "resident"
    models, stay = reward_models(config, stage=stage), config.reward.model_placement == "resident"
    activations, backward = _update(
        config, vocab_size, replicas=replicas, stage=stage, device=device
    )
    cache, prefill = _rollout(config, vocab_size, replicas=replicas, device=device)
    return Memory(
        weights=weights,
        gradients=count * FP32,
        optimizer=_optimizer(config, config.optimizer, count, replicas=replicas, device=device),
        reference=weights if resident else 0,
        reward=sum(used.weights for used in models) if stay else 0,
        scoring=max((used.forward + used.weights * (not stay) for used in models), default=0),
        critic=_critic(config, vocab_size, replicas=replicas, stage=stage, device=device),
        activations=activations,
        backward=backward,
        cache=cache,
        prefill=prefill,
        packed=_packed(config, vocab_size, stage=stage, device=device),
        overhead=device.overhead,
    )


def _optimizer(
    config: Config, optimizer: OptimizerConfig, count: int, *, replicas: int, device: Device
) -> int:
    """Adam's bytes on the device for a rank that holds `count` parameters."""
    if optimizer.offload and device is GPU:
        return 0
    shards = optimizer_shards(optimizer, config.parallel, replicas)
    return count * optimizer_bytes(config.model) // shards


def _critic(config: Config, vocab_size: int, *, replicas: int, stage: int, device: Device) -> int:
    if not config.algorithm.has_critic:
        return 0
    model, parallel = config.model, config.parallel
    count = stage_parameters(model, parallel, vocab_size=vocab_size, stage=stage, scalar=True)
    adam = _optimizer(config, config.critic.optimizer, count, replicas=replicas, device=device)
    return count * (weight_bytes(model) + FP32) + adam


class RewardModelBytes(NamedTuple):
    """Bytes of a reward model on a rank."""

    weights: int
    forward: int
    """A forward pass in one layer. A layer keeps nothing for a backward pass."""


def reward_models(config: Config, *, stage: int) -> list[RewardModelBytes]:
    """The reward models on a rank of a stage. Reads their directories."""
    if not config.reward.model_names:
        return []
    from megatron_rpp.runtime.reward_models import reward_model_config  # loads torch

    parallel, found = config.parallel, []
    for name in config.reward.model_names:
        model, vocab_size = reward_model_config(config, name)
        count = stage_parameters(model, parallel, vocab_size=vocab_size, stage=stage, scalar=True)
        tokens = config.train.max_tokens_per_microbatch // parallel.context
        layer = 3 * model.ffn_hidden // parallel.tensor + 4 * model.hidden
        width = weight_bytes(model)
        found.append(RewardModelBytes(count * width, tokens * layer * width))
    return found


def _update(
    config: Config, vocab_size: int, *, replicas: int, stage: int, device: Device
) -> tuple[int, int]:
    """(activations, the largest step of the backward pass) of one stage."""
    model, parallel, train = config.model, config.parallel, config.train
    samples = -(-config.rollout.samples_per_step // replicas)
    most = samples * model.max_length // parallel.context  # all tokens of the replica
    row = max(train.max_tokens_per_microbatch, model.max_length) // parallel.context
    tokens = min(row, most)
    held = min(row * activation.rows_in_flight(parallel, stage), most)

    layer = activation.layer_activations(model, parallel, device)
    chunk_layers = model.layers // (parallel.pipeline * parallel.virtual_pipeline)
    per_token = parallel.virtual_pipeline * activation.kept_bytes(
        layer, train, chunk_layers=chunk_layers, fused_norm=device.fused_kernels
    )
    last = stage == parallel.pipeline - 1
    # The schedule keeps the output of every chunk that sends one.
    per_token += (parallel.virtual_pipeline - last) * layer.input
    backward = activation.layer_backward_bytes(model, parallel, tokens=tokens, device=device)
    backward += tokens * activation.recomputed_bytes(layer, train, chunk_layers)
    if parallel.virtual_pipeline > 1:  # the next chunk's input and gradient are received already
        backward += 2 * tokens * layer.input
    if last:
        rows = min(tokens, tokens * config.rollout.max_new_tokens // model.max_length + 1)
        head = activation.head_bytes(
            model, parallel, vocab_size=vocab_size, tokens=tokens, rows=rows, device=device
        )
        backward = max(backward, head.total)
    return int(held * per_token), backward


def _rollout(config: Config, vocab_size: int, *, replicas: int, device: Device) -> tuple[int, int]:
    """(the cache, the largest step of prefill and sampling) of a stage; vLLM has its own."""
    if config.rollout.engine == "vllm":
        return 0, 0
    model, parallel, rollout = config.model, config.parallel, config.rollout
    width = weight_bytes(model)
    own = -(-rollout.samples_per_step // (replicas * parallel.context))
    sequences = min(rollout.max_batch, own)
    # The engine takes less if rollout.max_cache_tokens is null and memory is short.
    positions = sequences * -(-model.max_length // device.cache_block) * device.cache_block
    positions = min(positions, rollout.max_cache_tokens or positions)
    positions += parallel.pipeline * device.cache_block  # of no sequence, one for each batch
    cached = positions * cache_bytes_per_token(model, parallel)
    prompts = -(-sequences // rollout.samples_per_prompt)
    tokens = min(prompts * (model.max_length - rollout.max_new_tokens), decode_sizes.PASS_TOKENS)
    layer = 3 * model.ffn_hidden // parallel.tensor + 4 * model.hidden
    # Logits, probabilities, and as integers of twice that size, and their sums.
    sampling = 6 * sequences * vocab_size * FP32
    return cached, max(tokens * layer * width, sampling)


def _packed(config: Config, vocab_size: int, *, stage: int, device: Device) -> int:
    """The copies of a stage's weights for a rollout (model/decoder.py); vLLM has its own weights."""
    model, parallel = config.model, config.parallel
    width = weight_bytes(model)
    if not device.packs_weights or width != FP32 or config.rollout.engine == "vllm":
        return 0
    matrices = layer_matrices(model, parallel.tensor) * (model.layers // parallel.pipeline)
    if stage == parallel.pipeline - 1:
        matrices.append(vocabulary_rows(vocab_size, parallel.tensor) * model.hidden)
    return width * sum(size for size in matrices if size >= decode_sizes.SMALLEST_PACKED)


def cache_bytes_per_token(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Bytes of the keys and values of one token on a rank."""
    _, kv_heads, size = heads_of(model)
    layers = model.layers // parallel.pipeline
    return layers * 2 * kv_heads * size * weight_bytes(model) // parallel.tensor


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """Bytes of one checkpoint: weights and Adam's state, once, whatever the layout."""
    return sum(
        stage_parameters(
            config.model, ParallelConfig(), vocab_size=vocab_size, stage=0, scalar=scalar
        ) * saved_bytes(config.model, optimizer.distributed)
        for scalar, optimizer in trained_models(config)
    )  # fmt: skip


def trained_models(config: Config) -> list[tuple[bool, OptimizerConfig]]:
    """Whether its head is a scalar, and the optimizer, of each model that is trained."""
    critic = [(True, config.critic.optimizer)] if config.algorithm.has_critic else []
    return [(False, config.optimizer), *critic]
