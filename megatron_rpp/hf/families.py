"""Which Hugging Face tensors make which of Megatron's, by architecture.

To add a family whose blocks are those of a decoder with RMSNorm, rotary positions and SwiGLU, add a
line to FAMILIES: the name in config.json's `architectures`, and rows. A row names one of Megatron's
parameters and the tensors it is made of; `{layer}` stands for the layer's number in the whole
model. How they are put together is one of three kinds:

    COPY      the tensor itself
    QKV       queries, keys and values interleaved by key-value head: [q.. k v] per head
    GATE_UP   the gate above the up projection

A tensor-parallel rank's part of the result is made of the same part of each source, in all three.

Left out: mixtures of experts, multi-head latent attention, layers that differ from each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["COPY", "QKV", "GATE_UP"]


@dataclass(frozen=True)
class Row:
    """One of Megatron's parameters and the Hugging Face tensors that it holds."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind = "COPY"

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron

    def of_layer(self, layer: int) -> "Row":
        """The row with its names filled in."""
        names = tuple(name.format(layer=layer) for name in self.hf)
        return Row(self.megatron.format(layer=layer), names, self.kind)

    def merge(self, parts: list[torch.Tensor], head_dim: int) -> torch.Tensor:
        """Megatron's tensor from `parts`, the tensors of `hf` or one rank's part of each."""
        if self.kind == "COPY":
            return parts[0]
        if self.kind == "GATE_UP":
            return torch.cat(parts)
        groups = parts[1].shape[0] // head_dim
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)

    def split(self, whole: torch.Tensor, heads: int, kv_heads: int) -> list[torch.Tensor]:
        """The tensors of `hf` from Megatron's whole one; the inverse of `merge`."""
        if self.kind == "COPY":
            return [whole]
        if self.kind == "GATE_UP":
            return list(whole.chunk(2))
        queries = heads // kv_heads
        grouped = whole.unflatten(0, (kv_heads, queries + 2, -1))
        parts = grouped.split([queries, 1, 1], 1)
        return [part.flatten(0, 2).contiguous() for part in parts]

    def part_shapes(
        self, shape: tuple[int, ...], heads: int, kv_heads: int
    ) -> list[tuple[int, ...]]:
        """The shapes of what `split` gives for a whole of `shape`."""
        whole = torch.empty(shape, device="meta")
        return [tuple(part.shape) for part in self.split(whole, heads, kv_heads)]


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."


def _layer(megatron: str, *hf: str, kind: Kind = "COPY") -> Row:
    return Row(_LAYER + megatron, tuple(_HF_LAYER + name for name in hf), kind)


def _qkv(field: str) -> Row:
    sources = (f"self_attn.{x}_proj.{field}" for x in "qkv")
    return _layer(f"self_attention.linear_qkv.{field}", *sources, kind="QKV")


_LLAMA = (
    Row(EMBEDDING, ("model.embed_tokens.weight",)),
    _layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    _qkv("weight"),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    _layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    _layer(
        "mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", kind="GATE_UP"
    ),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Row(OUTPUT, ("lm_head.weight",)),
)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)

# Llama 2 and 3, SmolLM2 · Mistral · Qwen2 and 2.5 · Qwen3 (dense)
FAMILIES: dict[str, tuple[Row, ...]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": (*_LLAMA, _qkv("bias")),
    "Qwen3ForCausalLM": (*_LLAMA, *_QK_NORM),
}

# The names above are those of TransformerEngine's fused modules, which are also the names in every
# checkpoint; Megatron's own modules keep the norms apart.
_LOCAL_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# Buffers that old Llama files hold; they follow from config.json.
IGNORED = ("rotary_emb.inv_freq",)


def canonical(name: str) -> str:
    """A parameter's name in a checkpoint and in the table, under either naming of the norms."""
    for local, fused in _LOCAL_NAMES.items():
        if name.endswith(local):
            return name.removesuffix(local) + fused
    return name


def rows_of(architecture: str, layers: int, tied: bool) -> list[Row]:
    """Every row of a whole model, layer numbers filled in.

    Raises ValueError where the architecture has no table.
    """
    if architecture not in FAMILIES:
        raise ValueError(
            f"no table for the architecture {architecture!r}: known are {', '.join(FAMILIES)}; "
            f"add it to megatron_rpp/hf/families.py"
        )
    rows: list[Row] = []
    for row in FAMILIES[architecture]:
        if row.per_layer:
            rows += [row.of_layer(layer) for layer in range(layers)]
        elif not (tied and row.megatron == OUTPUT):
            rows.append(row)
    return rows
