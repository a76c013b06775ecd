"""The forward pass of generation: the weights of Megatron's layers, without Megatron's modules.

A token of generation has so little work per layer that calls and kernel launches decide its time, and
Megatron's modules make several times as many of them as this pass. It takes tokens in a flat row, of any
number of sequences, and leaves attention to the cache. tests/model/test_language_model.py compares
it with the modules, on every layout, and for the families' biases and norms.

Shape legend: t tokens of the row, h hidden, n query heads of this rank, k key-value heads of this
rank, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_rpp.model import decode_sizes, overlap
from megatron_rpp.model.language_model import LanguageModel, chunks
from megatron_rpp.model.norm import rms_norm
from megatron_rpp.model.rotary import Rotation
from megatron_rpp.parallel.products import linear, packed


class Attend(Protocol):
    """Causal attention over the cache. Layers are counted over all chunks of this rank."""

    def __call__(
        self, layer: int, *, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Maps query [t, k, n/k, d], key and value [t, k, d] to context [t, n·d]."""


@dataclass(frozen=True)
class _Layer:
    """The weights of one layer on this rank, as Megatron lays them out. Large ones may be packed."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    projection: torch.Tensor
    mlp_norm: torch.Tensor
    gate_and_up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention, mlp = layer.self_attention, layer.mlp
        normed = attention.config.qk_layernorm
        return cls(
            attention_norm=_norm_before(attention.linear_qkv, layer.input_layernorm),
            qkv=_for_products(attention.linear_qkv.weight),
            # Without a bias, TransformerEngine's module has an empty tensor.
            qkv_bias=attention.linear_qkv.bias if attention.config.add_qkv_bias else None,
            query_norm=attention.q_layernorm.weight if normed else None,
            key_norm=attention.k_layernorm.weight if normed else None,
            projection=_for_products(attention.linear_proj.weight),
            mlp_norm=_norm_before(mlp.linear_fc1, layer.pre_mlp_layernorm),
            gate_and_up=_for_products(mlp.linear_fc1.weight),
            down=_for_products(mlp.linear_fc2.weight),
        )


def _for_products(weight: torch.Tensor) -> torch.Tensor:
    return packed(weight) if weight.numel() >= decode_sizes.SMALLEST_PACKED else weight


def _norm_before(linear: Any, norm: Any) -> torch.Tensor:
    """The weight of the RMSNorm before `linear`; TransformerEngine keeps it in the linear module."""
    return linear.layer_norm_weight if hasattr(linear, "layer_norm_weight") else norm.weight


class Decoder:
    """The forward pass of one chunk. It holds the weights of the moment: make a new one after the
    model has been changed."""

    def __init__(self, chunk: LanguageModel, first_layer: int):
        """first_layer: layers of this rank's chunks before this one."""
        config, group = chunk.config, chunk.pg_collection.tp
        self.chunk = chunk
        self._layers = [_Layer.of(layer) for layer in chunk.decoder.layers]
        self._output = _for_products(chunk.output_weight) if chunk.post_process else None
        self._first_layer, self._group, self._eps = first_layer, group, config.layernorm_epsilon
        self.kv_heads = config.num_query_groups // group.size()
        self.head_size = config.kv_channels
        self._rotation = chunk.rotation()

    @property
    def layers(self) -> int:
        return len(self._layers)

    def forward(
        self, tokens_or_hidden: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Returns the hidden states [t, h] after this chunk; normalised after the last one.

        Args:
            tokens_or_hidden: token ids [t] for the first chunk, hidden states [t, h] for others,
                which are overwritten.
            positions: [t], of each token in its sequence.
        """
        hidden = self._embed(tokens_or_hidden) if self.chunk.pre_process else tokens_or_hidden
        rotation = self._rotation.at(positions)
        for number, layer in enumerate(self._layers, self._first_layer):
            query, key, value = self._project(layer, hidden, rotation)
            context = attend(number, query=query, key=key, value=value)
            hidden += self._sum(linear(context, layer.projection))
            gate, up = linear(self._norm(hidden, layer.mlp_norm), layer.gate_and_up).chunk(2, -1)
            hidden += self._sum(linear(F.silu(gate).mul_(up), layer.down))
        if self.chunk.post_process:
            hidden = self._norm(hidden, self.chunk.decoder.final_layernorm.weight)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See LanguageModel.sampling_logits; only of the last chunk."""
        return self.chunk.sampling_logits(hidden, self._output)

    def _project(
        self, layer: _Layer, hidden: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [t, k, n/k, d], key and value [t, k, d], with rotary positions."""
        mixed = linear(self._norm(hidden, layer.attention_norm), layer.qkv, layer.qkv_bias)
        # Of each key-value head: its query heads, the key, the value.
        mixed = mixed.view(len(hidden), self.kv_heads, -1, self.head_size)
        rotating, value = mixed[:, :, :-1], mixed[:, :, -1]
        if layer.query_norm is not None and layer.key_norm is not None:
            query = self._norm(rotating[:, :, :-1], layer.query_norm)
            rotating = torch.cat([query, self._norm(rotating[:, :, -1:], layer.key_norm)], 2)
        rotated = rotation.rotate(rotating)
        return rotated[:, :, :-1], rotated[:, :, -1], value

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [t, h] of token ids [t]; each tensor-parallel rank holds some of the rows."""
        weight = self.chunk.embedding.word_embeddings.weight
        if self._group.size() == 1:
            return F.embedding(tokens, weight)
        own = tokens - self._group.rank() * len(weight)
        outside = (own < 0) | (own >= len(weight))
        hidden = F.embedding(own.masked_fill(outside, 0), weight)
        return self._sum(hidden.masked_fill_(outside[:, None], 0.0))

    def _norm(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(values, weight, self._eps)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the tensor-parallel ranks, in place."""
        if self._group.size() > 1:
            dist.all_reduce(values, group=self._group)
        return values


def decoders(model: torch.nn.Module) -> list[Decoder]:
    """The forward passes of this rank's chunks, in the order of their layers."""
    assert overlap.are_weights_complete(model)
    found: list[Decoder] = []
    for chunk in chunks(model):
        found.append(Decoder(chunk, sum(decoder.layers for decoder in found)))
    return found
