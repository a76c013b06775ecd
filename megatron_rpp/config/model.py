"""The section about the architecture of the model.

Left out: mixture of experts, sliding windows, biases other than on queries, keys and values.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megatron_rpp.config.validation import check_choices, check_divides, check_range
from megatron_rpp.lifecycle.config_error import ConfigError


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Llama 3's scaling: long wavelengths are stretched by factor, short ones are unchanged."""

    kind: Literal["none", "llama3"] = "none"
    """Kind of scaling; the other fields apply to llama3 only."""
    factor: float = 8.0
    """Factor by which long wavelengths are stretched."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_max_length / low_freq_factor are stretched by the full factor."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_max_length / high_freq_factor are unchanged."""
    original_max_length: int = 8192
    """Context in tokens that the model was trained with before scaling."""

    def __post_init__(self) -> None:
        check_choices("rope_scaling", self)
        check_range("rope_scaling", self, "factor low_freq_factor", above=0)
        check_range("rope_scaling", self, "high_freq_factor", above=self.low_freq_factor)
        check_range("rope_scaling", self, "original_max_length", at_least=1)


# Embedding rows are padded to a multiple of this and of the tensor-parallel size. So the padded
# size, and with it the shapes in a checkpoint, is the same for every usual tensor-parallel size.
VOCAB_MULTIPLE = 64


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding, all `tensor` ranks together."""
    multiple = math.lcm(VOCAB_MULTIPLE, tensor)
    return -(-vocab_size // multiple) * multiple


# Settings that a resume does not compare with the checkpoint: the shapes of the tensors show the
# sizes, and the context is not a property of the weights.
NOT_COMPARED = ("layers", "hidden", "ffn_hidden", "max_length")
_ARCHITECTURE = (
    *NOT_COMPARED, "heads", "kv_heads", "head_dim", "rope_theta", "rope_scaling", "qkv_bias",
    "qk_norm", "norm_eps", "tied_embeddings",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Decoder-only transformer: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

    layers: int = 4
    """Number of transformer layers."""
    hidden: int = 128
    """Width of the residual stream."""
    ffn_hidden: int = 344
    """Width of the inner layer of the SwiGLU feed-forward network."""
    heads: int = 4
    """Number of query heads."""
    kv_heads: int | None = None
    """Number of key-value heads, a divisor of heads (grouped-query attention); null = heads."""
    head_dim: int | None = None
    """Channels per head, an even number; null = hidden / heads."""
    vocab_size: int | None = None
    """Number of token ids before padding; null = the size of the tokenizer."""
    max_length: int = 256
    """Context length in tokens; prompt and response must fit into it together."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    qkv_bias: bool = False
    """Add biases to the query, key and value projections, as in Qwen2."""
    qk_norm: bool = False
    """Normalise the channels of each query and key head with RMSNorm, as in Qwen3."""
    norm_eps: float = 1e-5
    """Epsilon inside the square root of RMSNorm."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """Scaling of the rotary frequencies for a longer context."""
    tied_embeddings: bool = False
    """Share one matrix between the input embedding and the output layer."""
    init_std: float = 0.02
    """Standard deviation of the random initial weights."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of forward and backward; the optimizer always keeps fp32 master weights."""
    transformer_impl: Literal["auto", "transformer_engine", "local"] = "auto"
    """Modules of the layers: TransformerEngine's fused ones, or local, which are Megatron's own.
    auto = TransformerEngine on a GPU if it is installed."""
    init_path: str | None = None
    """Megatron checkpoint directory that policy and reference start from; null = random weights
    drawn from the seed. If the checkpoint was converted from Hugging Face, the architecture
    settings above that are left at their defaults, and the tokenizer, are read from it."""
    hf_path: str | None = None
    """Hugging Face model directory (safetensors) to start from instead of init_path. Architecture
    and tokenizer are read from it in the same way."""

    def __post_init__(self) -> None:
        check_range("model", self, "layers hidden ffn_hidden heads kv_heads vocab_size", at_least=1)
        check_range("model", self, "max_length head_dim", at_least=2)
        check_range("model", self, "rope_theta norm_eps init_std", above=0)
        check_choices("model", self)
        if self.head_dim is None:
            remedy = "change one of them or set model.head_dim"
            check_divides(
                "model.hidden", self.hidden, "model.heads", divisor=self.heads, remedy=remedy
            )
        head_dim = self.head_dim or self.hidden // self.heads
        if head_dim % 2:
            raise ConfigError(
                f"model.head_dim (model.hidden / model.heads if it is null) must be even, got "
                f"{head_dim}: rotary positions turn pairs of channels"
            )
        if self.hf_path is not None and self.init_path is not None:
            raise ConfigError(
                f"model.hf_path {self.hf_path} and model.init_path {self.init_path} are both set: "
                f"the weights come from only one of them, remove the other"
            )
        if self.kv_heads is not None:
            check_divides("model.heads", self.heads, "model.kv_heads", divisor=self.kv_heads)

    def architecture(self, vocab_size: int) -> dict[str, Any]:
        """The settings that define the function the weights compute, by name; none of them is
        null."""
        settings = {name: asdict(self)[name] for name in _ARCHITECTURE}
        settings["kv_heads"] = self.kv_heads or self.heads
        settings["head_dim"] = self.head_dim or self.hidden // self.heads
        if self.rope_scaling.kind == "none":
            settings["rope_scaling"] = {"kind": "none"}
        return settings | {"vocab_size": vocab_size}
