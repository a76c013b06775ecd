"""Core attention on torch's scaled_dot_product_attention, over packed rows or whole sequences.

Shape legend: t tokens of a packed row on this rank, c context-parallel ranks, m sequences in it,
s sequence, b batch, n query heads of this rank, k key-value heads of this rank, d head size.

Training and log-probs: sequences lie end to end in one row (`Row`), and attention is causal
within each of them. With TransformerEngine, its kernels take the row as it is. Without it, so does
PyTorch's kernel on GPUs, for 16-bit numbers and rows that ranks do not share; otherwise the row is
laid out as m padded sequences for this operation only. If the row is split over context-parallel
ranks, its keys and values are gathered first (and their gradients reduce-scattered).

Whole right-padded sequences need no mask: a token never attends to what follows it. Generation has
attention of its own, over a cache (kv_cache.py).

Left out: ring attention (each context-parallel rank holds all keys and values of one layer at a
time), attention dropout and biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_rpp.model.rotary import Rotation
from megatron_rpp.parallel import device as devices
from megatron_rpp.records import Packing

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule


@dataclass
class Row(PackedSeqParams):
    """Carries what our attention needs through Megatron to its modules.

    The format is not "thd", because Megatron then applies rotary angles of its own. The angles here
    are computed from each token's position.
    """

    packing: Packing | None = None
    """None for whole sequences."""
    rotation: Rotation | None = None
    """None if Megatron has already turned queries and keys."""

    @classmethod
    def of(cls, packing: Packing | None, rotation: Rotation | None = None) -> Row:
        return cls(qkv_format="sbhd", packing=packing, rotation=rotation)

    def for_transformer_engine(self) -> PackedSeqParams:
        assert self.packing is not None
        bounds, longest = self.packing.boundaries, self.packing.longest
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )


class CoreAttention(MegatronModule):
    """softmax(q·kᵀ/√d)·v, causal, with grouped-query heads (Ainslie et al., arXiv 2305.13245)."""

    def __init__(  # noqa: PLR0917 (Megatron's signature)
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
        self.context_group = pg_collection.cp
        # A list hides the module from state_dict. Its empty "extra state" must stay out of
        # checkpoints, because they also load without TransformerEngine.
        self.fused: list[torch.nn.Module] = []
        # TransformerEngine's kernels for packed rows take 16-bit types only.
        implementation = config.transformer_impl
        if implementation == "transformer_engine" and config.params_dtype != torch.float32:
            self.fused.append(
                _transformer_engine()(
                    config=config,
                    layer_number=layer_number,
                    attn_mask_type=AttnMaskType.causal,
                    attention_type=attention_type,
                    softmax_scale=softmax_scale,
                    cp_comm_type=cp_comm_type,
                    pg_collection=pg_collection,
                )
            )

    def forward(  # noqa: PLR0917 (Megatron's signature)
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Row | None = None,
    ) -> torch.Tensor:
        """Maps query [s, b, n, d], key and value [s, b, k, d] to context [s, b, n·d].

        In packed rows [t, 1, ...] takes the place of [s, b, ...].
        """
        assert attention_bias is None and packed_seq_params is not None
        row = packed_seq_params
        if row.rotation is not None:
            query, key = row.rotation.rotate(query), row.rotation.rotate(key)
        if row.packing is not None and self.fused:
            return self._transformer_engine(query, key, value, row=row)
        if row.packing is not None:
            return self._packed(query, key, value, packing=row.packing)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        return self._attend(query, key, value).permute(2, 0, 1, 3).flatten(2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over [b, heads, s, d] each: causal, or limited to `visible` [b, 1, s, s']."""
        if visible is not None:  # no memory-efficient kernel takes both a mask and grouped heads
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            is_causal=visible is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, packing: Packing
    ) -> torch.Tensor:
        """Attention over a packed row: by PyTorch's kernel for such rows, or else laid out as padded
        sequences for this operation."""
        sixteen_bit = query.dtype != torch.float32
        if packing.gathered is None and sixteen_bit and devices.has_varlen_attention():
            return _varlen(query, key, value, packing=packing, scale=self.softmax_scale)
        count = len(packing.boundaries) - 1
        if packing.gathered is not None:
            key, value = self._gather(torch.cat([key, value], -1), packing).chunk(2, -1)
        width = packing.longest // self.context_group.size()
        context = self._attend(
            _side_by_side(query, packing.query_cells, count=count, width=width),
            _side_by_side(key, packing.key_cells, count=count, width=packing.longest),
            _side_by_side(value, packing.key_cells, count=count, width=packing.longest),
            visible=packing.visible,
        )
        context = context.transpose(1, 2).flatten(0, 1)
        if len(context) != len(query):
            context = context[packing.query_cells]
        return context.flatten(1)[:, None]

    def _gather(self, values: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Gathers [t, 1, k, d] of this rank into [t·c, 1, k, d] in the order of the row."""
        ranks = gather_from_sequence_parallel_region(values, group=self.context_group)
        return ranks[packing.gathered]

    def _transformer_engine(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, row: Row
    ) -> torch.Tensor:
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        context = self.fused[0](
            query,
            key,
            value,
            None,
            attn_mask_type=AttnMaskType.causal,
            packed_seq_params=row.for_transformer_engine(),
        )
        return context.reshape(len(query), 1, -1)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    packing: Packing,
    scale: float | None,
) -> torch.Tensor:
    """Attention over a packed row by PyTorch's FlashAttention kernel for such rows."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = packing.boundaries, packing.longest
    context = varlen_attn(
        query[:, 0],
        key[:, 0],
        value[:, 0],
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[2] != key.shape[2],
    )
    assert isinstance(context, torch.Tensor)
    return context.flatten(1)[:, None]


def _side_by_side(
    values: torch.Tensor, cells: torch.Tensor, *, count: int, width: int
) -> torch.Tensor:
    """Lays [t, 1, heads, d] out as [count, heads, width, d]; cells without a token are zero."""
    if len(values) == count * width:  # all sequences are as long, so each token is in its cell
        return values.view(count, width, *values.shape[2:]).transpose(1, 2)
    flat = values.new_zeros(count * width, *values.shape[2:])
    flat = flat.index_copy(0, cells, values[:, 0])
    return flat.view(count, width, *values.shape[2:]).transpose(1, 2)


def _transformer_engine() -> type:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention
