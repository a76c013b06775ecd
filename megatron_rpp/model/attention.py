"""Core attention on torch's scaled_dot_product_attention, with an optional key-value cache.

Shape legend: s sequence, b batch, n query heads of this rank, k key-value heads of this rank,
d head size, t cache length.

Without a cache: causal attention over whole right-padded sequences (what follows a token never
reaches it, so padding needs no mask). With a cache (`KeyValueCache` set on the module by
`model.decoding`): the first call writes the prompts, each later call adds one token per sequence,
at that sequence's own position.

Left out: packed sequences, context parallelism, attention dropout and biases.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_rpp.parallel import device as _device  # noqa: F401  (before megatron)
from megatron.core.transformer.module import MegatronModule


class KeyValueCache:
    """Keys and values of one layer for a batch of sequences that grow one token at a time."""

    def __init__(self, length: int):
        self.length = length
        self.keys: torch.Tensor | None = None  # [b, k, t, d]
        self.values: torch.Tensor | None = None

    def write_prompts(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores the prompts' keys and values [b, k, s, d] at positions 0..s-1."""
        batch, heads, prompt, size = key.shape
        self.keys = key.new_zeros(batch, heads, self.length, size)
        self.values = value.new_zeros(batch, heads, self.length, size)
        self.keys[:, :, :prompt] = key
        self.values[:, :, :prompt] = value

    def append(self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> None:
        """Stores one token's key and value [b, k, d] per sequence at `positions` [b]."""
        rows = torch.arange(len(positions), device=positions.device)
        self.keys[rows, :, positions] = key
        self.values[rows, :, positions] = value

    def keep(self, rows: torch.Tensor) -> None:
        """Leaves sequences `rows` (int64 indices, possibly repeated) in the cache."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class CoreAttention(MegatronModule):
    """softmax(q·kᵀ/√d)·v, causal, with grouped-query heads (Ainslie et al., arXiv 2305.13245)."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cache: KeyValueCache | None = None
        self.decode_positions: torch.Tensor | None = None  # [b]; None while prompts are read
        self.decode_mask: torch.Tensor | None = None  # [b, 1, 1, t] bool, True = attend

    def forward(
        self,
        query,
        key,
        value,
        attention_mask=None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ):
        """query [s, b, n, d], key and value [s, b, k, d] -> context [s, b, n*d]."""
        assert attention_bias is None and packed_seq_params is None
        if self.decode_positions is not None:
            return self._decode(query, key, value)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        if self.cache is not None:
            self.cache.write_prompts(key, value)
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _decode(self, query, key, value):
        """One new token per sequence against its cache.

        The n/k query heads that share a key-value head become its query rows, so that keys and
        values are read once and never repeated.
        """
        self.cache.append(key[0], value[0], self.decode_positions)
        _, batch, heads, size = query.shape
        groups, attended = key.shape[2], self.decode_mask.shape[-1]
        context = F.scaled_dot_product_attention(
            query.view(batch, groups, heads // groups, size),
            self.cache.keys[:, :, :attended],
            self.cache.values[:, :, :attended],
            attn_mask=self.decode_mask,
            scale=self.softmax_scale,
        )
        return context.reshape(1, batch, heads * size)
