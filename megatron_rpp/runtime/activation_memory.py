"""Bytes that a pipeline stage needs for a forward and backward pass, besides weights and gradients.

Activations follow Korthikanti et al., arXiv 2205.05198, section 4, for this architecture: what
autograd saves for RMSNorm, attention without its score matrix, and SwiGLU.

Legend: h hidden, f feed-forward channels, t tokens of a row on one context-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rpp.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_rpp.model import decode_sizes, head_chunks
from megatron_rpp.runtime.model_size import FP32, heads_of, vocabulary_rows, weight_bytes


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the estimate must know of a kind of device."""

    fused_kernels: bool
    """RMSNorm and SwiGLU keep only their inputs and outputs, and attention reads packed rows. Else
    they keep what their single operations need, and attention pads the sequences."""
    logits_at_once: int
    """Logits of one chunk (model/head_chunks.py)."""
    cache_block: int
    """Positions in a block of the key-value cache."""
    packs_weights: bool
    """Whether a rollout makes packed copies of large fp32 weights."""
    overhead: int
    """Bytes of the CUDA context and of NCCL's buffers."""


GPU = Device(
    fused_kernels=True,
    logits_at_once=head_chunks.ON_GPU,
    cache_block=decode_sizes.CACHE_BLOCK_ON_GPU,
    packs_weights=False,
    overhead=3_000_000_000,
)
CPU = Device(
    fused_kernels=False,
    logits_at_once=head_chunks.ON_CPU,
    cache_block=decode_sizes.CACHE_BLOCK_ON_CPU,
    packs_weights=True,
    overhead=0,
)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one layer keeps for one token of this rank until its backward pass."""

    input: int
    """The residual stream that enters; part of `norms`."""
    norms: int
    attention: int
    ffn: int

    @property
    def total(self) -> int:
        return self.norms + self.attention + self.ffn


def layer_activations(
    model: ModelConfig, parallel: ParallelConfig, device: Device
) -> LayerActivations:
    """What autograd saves in one layer, without recomputation."""
    width, tensor = weight_bytes(model), parallel.tensor
    split = tensor if parallel.sequence_parallel else 1
    # A norm keeps its input and output. Of 16 bits and not fused, it keeps input and quotient in fp32
    # as well.
    norm = 2 * width if device.fused_kernels or width == FP32 else 2 * FP32 + width
    # Gate and up, and their product. Else sigmoid and silu as well.
    ffn = (3 if device.fused_kernels else 5) * model.ffn_hidden
    heads, _, size = heads_of(model)
    # Cosines and sines: all layers share them, unless TransformerEngine's kernel turns each anew.
    log_sums, rotary = heads * FP32, 4 * size * width if device.fused_kernels else 0
    attention = _attention_channels(model, parallel.context, device) * width + log_sums
    return LayerActivations(
        input=model.hidden * width // split,
        norms=2 * model.hidden * norm // split,
        attention=attention // tensor + rotary,
        ffn=ffn * width // tensor,
    )


def _attention_channels(model: ModelConfig, context: int, device: Device) -> int:
    heads, kv_heads, size = heads_of(model)
    if device.fused_kernels:
        # Projected queries, keys and values; rotated queries and keys; attention's output.
        kept = (heads + 2 * kv_heads) + (heads + kv_heads) + heads
    elif context == 1:
        # Queries, keys, values and output as padded sequences; the output as a row.
        kept = (heads + 2 * kv_heads) + heads + heads
    else:
        # Queries and outputs, as rows and as sequences; keys and values of all ranks, as a row and
        # repeated for every query head.
        kept = 4 * heads + context * (2 * kv_heads + 2 * heads)
    return kept * size


def kept_bytes(
    layer: LayerActivations, train: TrainConfig, *, chunk_layers: int, fused_norm: bool
) -> float:
    """Bytes that a model chunk of `chunk_layers` layers keeps for a token until its backward pass."""
    if train.recompute == "none":
        return chunk_layers * layer.total
    if train.recompute == "selective":
        # A fused norm belongs to the feed-forward network: its output is computed again, too.
        return chunk_layers * (layer.total - layer.ffn - (layer.input if fused_norm else 0))
    if train.recompute_method == "uniform":
        return chunk_layers / train.recompute_layers * layer.input
    again = train.recompute_layers
    return again * layer.input + (chunk_layers - again) * layer.total


def recomputed_bytes(layer: LayerActivations, train: TrainConfig, chunk_layers: int) -> int:
    """Bytes per token of what the backward pass computes again before it frees anything."""
    if train.recompute == "selective":
        return layer.ffn
    if train.recompute == "none":
        return 0
    if train.recompute_method == "uniform":
        return train.recompute_layers * layer.total
    return layer.total if train.recompute_layers == chunk_layers else 0


def layer_backward_bytes(
    model: ModelConfig, parallel: ParallelConfig, *, tokens: int, device: Device
) -> int:
    """Gradients in flight in the backward pass of one layer: those of the feed-forward network and
    of the residual stream, and that of a matrix."""
    width, tensor = weight_bytes(model), parallel.tensor
    inner = (3 if device.fused_kernels else 2) * model.ffn_hidden // tensor + 2 * model.hidden
    matrix = model.ffn_hidden * model.hidden // tensor
    return (inner * tokens + matrix) * width


@dataclass(frozen=True)
class Head:
    """Bytes of the output projection's backward pass (model/logprobs.py) on the last stage."""

    logits: int
    """Logits, probabilities and gradient of one chunk."""
    weight_gradient: int
    """[v, h] in fp32; for bf16 weights also the product that is added to it, in fp32."""
    hidden: int
    """Hidden states of the rows and their gradient, and what the final norm keeps."""

    @property
    def total(self) -> int:
        return self.logits + self.weight_gradient + self.hidden


def head_bytes(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    vocab_size: int,
    tokens: int,
    rows: int,
    device: Device,
) -> Head:
    """rows: of the row's `tokens`, how many are response tokens."""
    width, vocabulary = weight_bytes(model), vocabulary_rows(vocab_size, parallel.tensor)
    copies = 1 if model.dtype == "fp32" else 2
    return Head(
        logits=3 * FP32 * min(device.logits_at_once, rows * vocabulary),
        weight_gradient=copies * vocabulary * model.hidden * FP32,
        hidden=2 * rows * model.hidden * width + 2 * tokens * model.hidden * FP32,
    )


def rows_in_flight(parallel: ParallelConfig, stage: int = 0) -> float:
    """Micro-batches whose activations a stage holds at once, under 1F1B; interleaved, each of its
    chunks counts for its share (Narayanan et al., arXiv 2104.04473, section 2.2)."""
    stages, parts = parallel.pipeline, parallel.virtual_pipeline
    if parts == 1:
        return stages - stage
    warm_up = 2 * (stages - stage - 1) + (parts - 1) * stages
    return (warm_up + 1) / parts
