"""How many parameters a rank holds, and the bytes of each, from the settings alone.

Left out: mixture of experts, stages of different sizes.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_rpp.config import ModelConfig, ParallelConfig
from megatron_rpp.config.model import padded_vocab_size

FP32, BF16 = 4, 2


class Heads(NamedTuple):
    query: int
    key_value: int
    size: int
    """Channels of each."""


def heads_of(model: ModelConfig) -> Heads:
    size = model.head_dim or model.hidden // model.heads
    return Heads(model.heads, model.kv_heads or model.heads, size)


def layer_matrices(model: ModelConfig, tensor: int) -> list[int]:
    """Elements of each matrix of one layer on one of `tensor` ranks."""
    heads, kv_heads, size = heads_of(model)
    rows = ((heads + 2 * kv_heads) * size, heads * size, 2 * model.ffn_hidden, model.ffn_hidden)
    return [model.hidden * count // tensor for count in rows]


def layer_parameters(model: ModelConfig, tensor: int) -> int:
    """Parameters of one layer on one of `tensor` ranks."""
    heads, kv_heads, size = heads_of(model)
    bias = (heads + 2 * kv_heads) * size if model.qkv_bias else 0
    return (
        sum(layer_matrices(model, tensor))
        + bias // tensor
        + 2 * model.hidden
        + (2 * size if model.qk_norm else 0)
    )


def vocabulary_rows(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding on one of `tensor` ranks."""
    return padded_vocab_size(vocab_size, tensor) // tensor


def stage_parameters(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    vocab_size: int,
    stage: int,
    scalar: bool = False,
) -> int:
    """Parameters of pipeline stage `stage` on one tensor-parallel rank.

    scalar: of a critic or a reward model, which has one number per token instead of a vocabulary.
    """
    embedding = vocabulary_rows(vocab_size, parallel.tensor) * model.hidden
    first, last = stage == 0, stage == parallel.pipeline - 1
    count = model.layers // parallel.pipeline * layer_parameters(model, parallel.tensor)
    if first:
        count += embedding
    if last:
        count += model.hidden  # the final norm
        if scalar:
            count += model.hidden
        elif not (model.tied_embeddings and first):  # a last stage of its own has a copy if tied
            count += embedding
    return count


def weight_bytes(model: ModelConfig) -> int:
    """Bytes of one weight on the device."""
    return BF16 if model.dtype == "bf16" else FP32


def optimizer_bytes(model: ModelConfig) -> int:
    """Adam's bytes for one parameter: two moments, and an fp32 weight beside a bf16 one."""
    return 2 * FP32 + (FP32 if model.dtype == "bf16" else 0)


def saved_bytes(model: ModelConfig, distributed: bool) -> int:
    """A checkpoint's bytes for one parameter: weight, moments and, where Megatron's optimizer is
    distributed or keeps one beside a bf16 weight, the fp32 weight."""
    master = FP32 if distributed or model.dtype == "bf16" else 0
    return weight_bytes(model) + 2 * FP32 + master
