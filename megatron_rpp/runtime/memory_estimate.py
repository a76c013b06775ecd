"""Estimates how many bytes a rank will hold, from the settings alone; uses no device.

The estimate is for the pipeline stage that holds the most. Activations follow Korthikanti et al.,
arXiv 2205.05198, section 4, for this architecture: what autograd saves for RMSNorm, attention
without its score matrix, and SwiGLU. Left out: the allocator's fragmentation, NCCL's buffers
(1-2 GB per GPU), the CUDA context.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from megatron_rpp.config import Config, ParallelConfig
from megatron_rpp.config.model import ModelConfig, padded_vocab_size

FP32, BF16 = 4, 2
LOGITS_AT_ONCE = 3 * 2**26 * FP32
"""Logits, probabilities and gradient of one chunk on a GPU (model/logprobs.py); a CPU's is smaller."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    logits: int
    cache: int

    @property
    def total(self) -> int:
        """The peak. The cache is freed before the update, which needs the activations."""
        both = self.activations + self.logits
        return sum(astuple(self)) - min(both, self.cache)


def _heads(model: ModelConfig) -> tuple[int, int, int]:
    """(query heads, key-value heads, channels per head)."""
    return (
        model.heads,
        model.kv_heads or model.heads,
        model.head_dim or model.hidden // model.heads,
    )


def _layer(model: ModelConfig, tensor: int) -> int:
    """Parameters of one layer on one of `tensor` ranks."""
    heads, kv_heads, size = _heads(model)
    qkv = (heads + 2 * kv_heads) * size
    matrices = model.hidden * (qkv + heads * size + 3 * model.ffn_hidden)
    sharded = matrices + (qkv if model.qkv_bias else 0)
    return sharded // tensor + 2 * model.hidden + (2 * size if model.qk_norm else 0)


def stage_parameters(
    model: ModelConfig, parallel: ParallelConfig, *, vocab_size: int, stage: int
) -> int:
    """Parameters of pipeline stage `stage` on one tensor-parallel rank."""
    embedding = padded_vocab_size(vocab_size, parallel.tensor) // parallel.tensor * model.hidden
    first, last = stage == 0, stage == parallel.pipeline - 1
    count = model.layers // parallel.pipeline * _layer(model, parallel.tensor)
    if first:
        count += embedding
    if last:
        count += model.hidden  # the final norm
        if not (model.tied_embeddings and first):  # a last stage of its own has a copy even if tied
            count += embedding
    return count


def weight_bytes(model: ModelConfig) -> int:
    """Bytes of one weight on the device."""
    return BF16 if model.dtype == "bf16" else FP32


def optimizer_bytes(model: ModelConfig) -> int:
    """Adam's bytes for one parameter: two moments, and an fp32 weight beside a bf16 one."""
    return 2 * FP32 + (FP32 if model.dtype == "bf16" else 0)


def layer_activations(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Bytes that autograd saves in one layer for one token, without fused kernels."""
    heads, kv_heads, size = _heads(model)
    width = weight_bytes(model)
    # Both norms: input and quotient in fp32, and their outputs.
    stream = model.hidden * (4 * FP32 + 2 * width)
    # Projected queries, keys and values; rotated queries and keys; attention's output.
    attention = (heads + 2 * kv_heads) + (heads + kv_heads) + heads
    # Gate, up, sigmoid, silu and their product.
    inner = (attention * size + 5 * model.ffn_hidden) * width + heads * FP32
    rotary = 4 * size * width
    split = parallel.tensor if parallel.sequence_parallel else 1
    return stream // split + inner // parallel.tensor + rotary


def has_reference(config: Config) -> bool:
    """Whether a reference model is on the device, beside the policy."""
    used = config.algorithm.kl_in_reward or config.algorithm.kl_loss_coef > 0
    return used and config.reference.placement == "resident"


def estimate(config: Config, vocab_size: int, replicas: int) -> Memory:
    """Bytes of the rank that holds the most; `replicas`: the data-parallel size."""
    model, parallel, rollout = config.model, config.parallel, config.rollout
    stages = range(parallel.pipeline)
    count = max(
        stage_parameters(model, parallel, vocab_size=vocab_size, stage=stage) for stage in stages
    )
    layers = model.layers // parallel.pipeline
    _, kv_heads, size = _heads(model)
    row = max(config.train.max_tokens_per_microbatch, model.max_length) // parallel.context
    sequences = min(rollout.max_batch, rollout.samples_per_step // replicas)
    cached = sequences * model.max_length * layers * 2 * kv_heads * size // parallel.tensor
    shards = replicas * parallel.context if config.optimizer.distributed else 1
    return Memory(
        weights=count * weight_bytes(model),
        gradients=count * FP32,
        optimizer=count * optimizer_bytes(model) // shards,
        reference=count * weight_bytes(model) if has_reference(config) else 0,
        activations=row * rows_in_flight(parallel) * layers * layer_activations(model, parallel),
        logits=min(LOGITS_AT_ONCE, 3 * row * padded_vocab_size(vocab_size, 1) * FP32),
        cache=cached * weight_bytes(model),
    )


def rows_in_flight(parallel: ParallelConfig) -> int:
    """Micro-batches whose activations the first stage holds at once (1F1B, interleaved or not)."""
    stages, parts = parallel.pipeline, parallel.virtual_pipeline
    return stages + (math.ceil((stages - 1) / parts) if parts > 1 else 0)


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """Bytes of one checkpoint: weights and Adam's state, once, whatever the layout."""
    model = config.model
    count = stage_parameters(model, ParallelConfig(), vocab_size=vocab_size, stage=0)
    return count * (weight_bytes(model) + optimizer_bytes(model))
